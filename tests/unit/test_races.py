"""Jobs that want one folder at the same moment: one owns it, whatever was left in it.

Each job is a real process; they start together at a gate.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
from launch import wait_for

from swap_hpc.run.owner import Owner, this_process

RACER = Path(__file__).parents[1] / "racer.py"
JOBS = 4
RACERS = {"host": "here", "job": "4711", "restarts": 1}

NOBODY = 2**22 + 1  # Linux gives no process this number
ENDED = replace(this_process(), host="here", process=NOBODY, key="ended")
ELSEWHERE = replace(this_process(), host="there", key="elsewhere")
REQUEUED = replace(ELSEWHERE, job="4711", key="requeued")


def left_by(*owners: Owner) -> Callable[[Path], None]:
    """Return what writes the files of owners into a folder, each of which replaced the one before.

    The last of them died before it moved its claim to `.owner`.
    """

    def write(folder: Path) -> None:
        names = [".owner", *(f".owner.{owner.key}" for owner in owners)]
        for name, owner in zip(names, owners, strict=False):
            (folder / name).write_text(owner.to_json())

    return write


def torn(folder: Path) -> None:
    """Leave the file of an owner as a crash of the file server may."""
    (folder / ".owner").write_text('{"host": "th')
    (folder / ".owner.4711.new").touch()


LEFT = {
    "nothing": left_by(),
    "an owner whose process has ended": left_by(ENDED),
    "an owner on another host without a heartbeat": left_by(ELSEWHERE),
    "the same job before it was put back into the queue": left_by(REQUEUED),
    "an owner that ended while it replaced another": left_by(ENDED, replace(ENDED, key="second")),
    "a file that was cut off": torn,
}


@pytest.fixture(scope="module")
def racers() -> Iterator[list["subprocess.Popen[str]"]]:
    pipe = subprocess.PIPE
    line = [sys.executable, str(RACER)]
    jobs = [subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True) for _ in range(JOBS)]
    yield jobs
    for job in jobs:
        job.kill()
        job.communicate()


def tell(job: "subprocess.Popen[str]", line: str) -> None:
    assert job.stdin
    job.stdin.write(f"{line}\n")
    job.stdin.flush()


def output(job: "subprocess.Popen[str]") -> IO[str]:
    assert job.stdout
    return job.stdout


def race(
    jobs: list["subprocess.Popen[str]"],
    folder: Path,
    hold: float | None,
    groups: tuple[int | None, ...] = (None,) * JOBS,
    patience: float = 0.0,
) -> list[str]:
    """Start jobs together, and return what became of each."""
    for job, group in zip(jobs, groups, strict=True):
        owner: dict[str, Any] = {"folder": str(folder), "owner": RACERS}
        tell(job, json.dumps({**owner, "group": group, "hold": hold, "patience": patience}))
    assert {output(job).readline() for job in jobs} == {"ready\n"}
    (folder / "GATE").touch()
    return [output(job).readline().strip() for job in jobs]


@contextmanager
def emptied(jobs: list["subprocess.Popen[str]"], folder: Path, ended: list[str]) -> Iterator[None]:
    """Let the owners among the jobs leave afterwards, and check that they leave nothing."""
    yield
    for job, outcome in zip(jobs, ended, strict=True):
        if outcome == "owner":
            tell(job, "")
    is_left(folder)


def is_left(folder: Path) -> None:
    """Wait until the owners of a folder have left it, with nothing of theirs in it."""
    wait_for(lambda: [path.name for path in folder.iterdir()] == ["GATE"], "empty folder", 0.005)


@pytest.mark.parametrize("left", LEFT)
def test_one_of_several_jobs_owns_a_folder(
    left: str, racers: list["subprocess.Popen[str]"], tmp_path: Path
) -> None:
    """In all, the cases of this test are 102 races."""
    for number in range(17):
        folder = tmp_path / str(number)
        folder.mkdir()
        LEFT[left](folder)
        ended = race(racers, folder, hold=None)
        with emptied(racers, folder, ended):
            assert sorted(line == "owner" for line in ended) == [False] * (JOBS - 1) + [True]
            owner = racers[ended.index("owner")].pid
            line = f"{folder} is in use by process {owner} on here, job 4711: wait for it"
            assert all(refused.startswith(line) for refused in ended if refused != "owner")


def test_owners_that_leave_at_once_follow_each_other(
    racers: list["subprocess.Popen[str]"], tmp_path: Path
) -> None:
    """A job that saw a dead owner does not take the folder from one that came and left since."""
    for number, left in enumerate([*LEFT] * 4):
        folder = tmp_path / str(number)
        folder.mkdir()
        LEFT[left](folder)
        ended = race(racers, folder, hold=0.001)
        assert "owner" in ended and "" not in ended
        is_left(folder)


def test_jobs_of_single_groups_work_together_or_not_at_all(
    racers: list["subprocess.Popen[str]"], tmp_path: Path
) -> None:
    """One job wants the whole run, two others group 0, and one group 1."""
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        ended = race(racers, folder, hold=None, groups=(None, 0, 0, 1))
        with emptied(racers, folder, ended):
            whole, first, second, other = (line == "owner" for line in ended)
            assert (whole, first + second, other) in [(True, 0, False), (False, 1, True)]


def test_jobs_of_all_groups_follow_a_job_of_the_whole_run_that_died(
    racers: list["subprocess.Popen[str]"], tmp_path: Path
) -> None:
    """Each may be the one that removes its file, and none takes that one for a living owner."""
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        LEFT["an owner on another host without a heartbeat"](folder)
        ended = race(racers, folder, hold=None, groups=(0, 1, 2, 3), patience=60.0)
        with emptied(racers, folder, ended):
            assert ended == ["owner"] * JOBS
