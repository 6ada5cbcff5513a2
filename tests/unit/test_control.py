"""What signals ask for, and what counts as a standstill."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from swap_hpc.run.watchdog import _Stillness
from swap_hpc.train.control import STOPPING, Control


@pytest.fixture
def control() -> Iterator[Control]:
    before = {number: signal.getsignal(number) for number in STOPPING}
    control = Control()
    control.listen()
    yield control
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPPING, ids=lambda n: n.name)
def test_a_signal_asks_for_a_stop_and_does_nothing_else(
    control: Control, number: signal.Signals
) -> None:
    assert not control.due()
    os.kill(os.getpid(), number)
    assert control.stop and control.due()


def test_a_second_interrupt_does_not_wait(control: Control) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_save_that_the_recipe_asks_for_waits_for_its_time() -> None:
    control = Control(min_seconds=0.2)
    assert not control.due(wanted=True)
    time.sleep(0.25)
    assert control.due(wanted=True) and not control.due()
    control.saved()
    assert not control.due(wanted=True)
    control.stop = True
    assert control.due(wanted=True)
    assert Control().due(wanted=True)  # no time was named


def test_a_save_is_due_when_its_time_has_come() -> None:
    control = Control(save_seconds=0.05)
    assert not control.due()
    time.sleep(0.06)
    assert control.due() and not control.stop
    control.saved()
    assert not control.due()


def test_a_standstill_counts_from_the_last_change() -> None:
    stillness = _Stillness()
    assert [stillness.see(value, 2.0) for value in (1, 1, 1, 2, 2)] == [0.0, 2.0, 4.0, 0.0, 2.0]


PROGRAM = """
import sys, time
from pathlib import Path
from swap_hpc.train.control import Control
from swap_hpc.parallel.grid import grid
from swap_hpc.parallel.teams import Team
from swap_hpc.run.watchdog import watching
control = Control()
with grid(Team.world(), 1) as ranks, watching(control, 1 / 60, Path(sys.argv[1]), ranks):
    {body}
print("ended")
"""


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        (
            "control.heartbeat('epoch 3'); time.sleep(30)",
            3,
            "swap-hpc: no progress for 1 s after epoch 3: this rank, or one",
        ),
        ("[(control.heartbeat('a step'), time.sleep(0.1)) for _ in range(25)]", 0, "ended"),
        (
            "wait = control.waiting(); wait.__enter__(); time.sleep(2.5)",
            0,
            "ended",
        ),  # for other groups
    ],
    ids=["stands still", "goes on", "waits"],
)
def test_a_rank_that_stands_still_ends(body: str, code: int, says: str, tmp_path: object) -> None:
    begin = time.monotonic()
    line = [sys.executable, "-c", PROGRAM.format(body=body), str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and says in done.stdout + done.stderr, done.stderr
    assert time.monotonic() - begin < 20
