"""`tests/hosts.py`: hosts on one machine, their rate, and that nothing of them stays."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import hosts
import pytest
from launch import BIN, HANG, wait_for

PROGRAM = Path(hosts.__file__)
MPI_SUM = """
import sys, time
import numpy as np
from mpi4py import MPI
world, values = MPI.COMM_WORLD, np.ones(int(sys.argv[1]) // 4, np.float32)
total = np.empty_like(values)
enough = False
while not enough:
    world.Barrier()
    begin = time.monotonic()
    world.Allreduce(values, total)
    seconds = time.monotonic() - begin
    enough = world.bcast(seconds < float(sys.argv[2]))
if world.rank == 0:
    print("seconds", seconds)
"""


@pytest.fixture(autouse=True)
def _can_be_made() -> None:
    try:
        hosts.check(1, 1.0)
    except hosts.Refused as error:
        pytest.skip(str(error))


def on_hosts(*arguments: str | Path) -> "subprocess.Popen[str]":
    line = [sys.executable, PROGRAM, *arguments]
    env = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*map(str, line)], stdout=pipe, stderr=pipe, text=True, env=env, start_new_session=True
    )


def left(starter: "subprocess.Popen[str]") -> list[str]:
    """Return what there is of the hosts that a process has made: control groups, processes."""
    mark = f"hosts-{starter.pid}-"
    traces = [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/{mark}*")]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                traces.append(process.name)
        except OSError:  # it has just ended
            continue
    return traces


@pytest.mark.parametrize("rate", [20, 100])
def test_a_sum_of_mpi_sees_the_rate(rate: int) -> None:
    # Each of two ranks sends as many bytes as it holds, and receives as many at the same time.
    # Other work on this machine can only make a sum slower: the ranks add up until one is not.
    size = rate * 125_000 // 2  # half a second's worth
    process = on_hosts(
        *("--hosts", "2", "--cores", "0.5", "--rate", f"{rate}mbit"),
        *(sys.executable, "-c", MPI_SUM, str(size), str(0.5 / 0.85)),
    )
    output, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, errors
    seconds = float(re.findall(r"seconds (\S+)", output)[0])
    assert size * 8 / seconds / 1e6 == pytest.approx(rate, rel=0.15)


def test_nothing_is_left_after_twenty_starts_of_which_ten_are_killed() -> None:
    for number in range(10):
        # Open MPI may wait for ever for the end of a rank that lives for a few milliseconds.
        undisturbed = on_hosts("--hosts", "3", "sleep", "1")
        assert undisturbed.wait(timeout=HANG) == 0
        assert not left(undisturbed)
        killed = on_hosts("--hosts", "3", sys.executable, "-c", "import time; time.sleep(9999)")
        wait_for(partial(left, killed), "host")
        time.sleep(0.1 * number)  # while the hosts are made, while mpirun starts, in the ranks
        killed.send_signal([signal.SIGKILL, signal.SIGTERM][number % 2])
        killed.wait(timeout=HANG)
        wait_for(partial(_nothing_left, killed), "end of everything on the hosts")


def _nothing_left(starter: "subprocess.Popen[str]") -> bool:
    return not left(starter)


def test_digits_run_on_eight_hosts(tmp_path: Path) -> None:
    process = on_hosts(
        *("--hosts", "8", "--cores", "0.25", "--rate", "100mbit", "-n", "8"),
        *(BIN / "swap-hpc", "train", "digits", "--out", tmp_path),
    )
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, errors
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert {place["host"] for place in facts["ranks"]} == {f"host-{i}" for i in range(8)}
    assert json.loads((tmp_path / "result.json").read_text())["ranks"] == 8


def test_each_host_runs_a_command_by_itself() -> None:
    script = "import socket, sys, time; time.sleep(1); print(*sys.argv[1:], socket.gethostname())"
    command = (sys.executable, "-c", script + "; sys.exit(int(sys.argv[1]) * 3)", "{host}")
    process = on_hosts("--hosts", "2", "--each", *command)
    output, errors = process.communicate(timeout=HANG)
    assert sorted(output.splitlines()) == ["0 host-0", "1 host-1"], errors
    assert process.returncode == 3  # the second one's


def test_a_host_that_is_cut_off_is_reached_by_none() -> None:
    ping = [sys.executable, "-c", "import socket; socket.create_connection(('host-1', 1), 1)"]
    with hosts.Cluster(2, 1.0, None) as cluster:

        def answer() -> str:
            """Return the error of a connection to a port of host-1 at which nobody listens."""
            process = cluster.start(1, ping, stderr=subprocess.PIPE, text=True)
            return str(process.communicate(timeout=HANG)[1])

        assert "ConnectionRefusedError" in answer()
        cluster.cut("host-1")
        assert "ConnectionRefusedError" not in answer()
        cluster.mend("host-1")
        assert "ConnectionRefusedError" in answer()


@pytest.mark.parametrize("cores", [0.01, 0.03, 0.07, 0.15, 2 / 49])
def test_the_kernel_grants_any_share_of_a_processor(cores: float, tmp_path: Path) -> None:
    group = hosts.control_group(f"hosts-of-{tmp_path.parent.name}-{tmp_path.name}")
    try:
        hosts.limit_processors(group, cores, 0)
    finally:
        group.rmdir()


def test_equal_shares_are_all_of_the_processors_whatever_their_rounding() -> None:
    at_hand = len(os.sched_getaffinity(0))
    with hosts.Cluster(49, at_hand / 49, None) as cluster:
        assert cluster.shares_all


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--hosts", "0"), "--hosts 0: 1 to 200"),
        (("--hosts", "2", "--rate", "fast"), "--rate fast: a number with kbit, mbit, gbit"),
        (
            ("--hosts", "2", "--rate", "10mbit/s"),
            "--rate 10mbit/s: a number with kbit, mbit, gbit",
        ),
        (("--hosts", "2", "--cores", "0.001"), "--cores 0.001: at least 0.01"),
        (("--hosts", "2", "--each", "-n", "2"), "--each starts one process on every host"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: tuple[str, ...], why: str) -> None:
    process = on_hosts(*arguments, "true")
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 2
    (line,) = errors.splitlines()
    assert line.startswith(f"hosts.py: {why}")
    assert not left(process)
