"""A run's folder has one owner; a job that was killed owns nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1, Part, Phase, refinement_of
from swap_hpc.run import lock
from swap_hpc.run.lock import owning

ALONE = Team.alone()

HOLDER = """
import fcntl, sys

file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("process 7 on there", file=file, flush=True)
print("has it", flush=True)
input()  # until it is killed
"""


def test_a_second_job_ends_with_a_line_that_names_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    out = tmp_path / "run"
    with owning(out, None, ALONE):
        for part in (None, refinement_of(1), Part(Phase.AVERAGE)):
            line = f"{out} is in use by process {os.getpid()} on .*: wait for it"
            with pytest.raises(UserError, match=line) as error, owning(out, part, ALONE):
                pass
            assert "\n" not in str(error.value)
    with owning(out, None, ALONE):
        pass
    assert not any(out.iterdir())


def test_jobs_that_refine_a_group_each_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    with owning(tmp_path, refinement_of(0), ALONE):
        with owning(tmp_path, refinement_of(1), ALONE):
            pass
        for part in (None, refinement_of(0), Part(Phase.AVERAGE), PHASE_1):
            names_owner = pytest.raises(UserError, match=f"process {os.getpid()} ")
            with names_owner, owning(tmp_path, part, ALONE):
                pass


def test_the_files_of_a_killed_job_are_no_obstacle(tmp_path: Path) -> None:
    pipe = subprocess.PIPE
    line = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True) as job:
        assert job.stdout and job.stdout.readline() == "has it\n"
        job.kill()
        job.wait()
    assert (tmp_path / ".lock").is_file()
    with owning(tmp_path, None, ALONE):
        pass
    assert not any(tmp_path.iterdir())


def test_a_job_waits_for_itself_to_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch system may start a job again while its old processes are still dying."""
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    old = owning(tmp_path, None, ALONE)
    old.__enter__()
    waits: list[float] = []

    def wait(seconds: float) -> None:
        if not waits:
            old.__exit__(None, None, None)
        waits.append(seconds)

    monkeypatch.setattr(lock.time, "sleep", wait)
    with owning(tmp_path, None, ALONE):
        assert waits
