"""Signals that ask for a stop, saves that are due, and the watchdog."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import HANG

from swap_hpc.run.standstill import Standstill
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
    control = Control(min_seconds=3600)
    assert not control.due(wanted=True)
    control.saved_at -= 3600
    assert control.due(wanted=True) and not control.due()
    control.saved()
    assert not control.due(wanted=True)
    control.stop = True
    assert control.due(wanted=True)
    assert Control().due(wanted=True)  # no time was named


def test_a_save_is_due_when_its_time_has_come() -> None:
    control = Control(save_seconds=3600)
    assert not control.due()
    control.saved_at -= 3600
    assert control.due() and not control.stop
    control.saved()
    assert not control.due()


def test_a_standstill_counts_from_the_last_change() -> None:
    standstill = Standstill()
    seconds = [standstill.update(value, passed=2.0) for value in (1, 1, 1, 2, 2)]
    assert seconds == [0.0, 2.0, 4.0, 0.0, 2.0]


PROGRAM = """
import sys, threading, time
from pathlib import Path
from swap_hpc.train.control import Control
from swap_hpc.parallel.grid import grid
from swap_hpc.parallel.teams import Team
from swap_hpc.run.watchdog import watching

control, LIMIT = Control(), 2

def hang():
    control.heartbeat("epoch 3")
    threading.Thread(target=another_thread, daemon=True).start()
    time.sleep(600)

def another_thread():
    time.sleep(600)

def make_steps():
    for _ in range(45):
        control.heartbeat("a step")
        time.sleep(0.1)

def wait_for_other_groups():
    with control.waiting():
        time.sleep(4.5)

with grid(Team.world(), 1) as ranks, watching(control, LIMIT / 60, Path(sys.argv[2]), ranks):
    globals()[sys.argv[1]]()
print("ended")
"""


def watched(what: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a function of the program for longer than its watchdog's limit."""
    line = [sys.executable, "-c", PROGRAM, what, str(folder)]
    return subprocess.run(line, capture_output=True, text=True, timeout=HANG)


@pytest.mark.parametrize("what", ["make_steps", "wait_for_other_groups"])
def test_a_rank_that_makes_steps_or_waits_is_left_alone(what: str, tmp_path: Path) -> None:
    done = watched(what, tmp_path)
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr


def test_a_rank_that_hangs_ends_with_a_line_and_its_stacks(tmp_path: Path) -> None:
    done = watched("hang", tmp_path)
    assert done.returncode == 3 and done.stdout == ""
    first, second, *stacks = done.stderr.splitlines()
    assert first.startswith("swap-hpc: no progress for 2 s after epoch 3: this rank, or one")
    assert second.startswith("Python stacks of rank 0, process ")
    for function in ("hang", "another_thread"):
        assert any(line.endswith(f" in {function}") for line in stacks), done.stderr
    assert not any(line.startswith("swap-hpc: ") for line in stacks)
