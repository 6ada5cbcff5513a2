"""A run's folder has one owner, whoever was killed before."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from swap_hpc import lock
from swap_hpc.errors import UserError
from swap_hpc.lock import owning
from swap_hpc.part import WHOLE, Part
from swap_hpc.ranks import Team


@contextmanager
def another_job(out: Path, part: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds a folder, until the block ends or somebody kills it."""
    code = f"""
from pathlib import Path
from swap_hpc.lock import owning
from swap_hpc.part import Part
from swap_hpc.ranks import Team
with owning(Path({str(out)!r}), {part}, Team.alone()):
    print("has it", flush=True)
    input()
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as job:
        assert job.stdout and job.stdout.readline() == "has it\n"
        try:
            yield job
        finally:
            job.communicate("\n")


def test_a_second_job_ends_with_a_line_that_names_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    out = tmp_path / "run"
    with another_job(out, "Part()") as job:
        for part in (WHOLE, Part("refine", 1), Part("average")):
            line = f"{out} is in use by process {job.pid} on .*: wait for it"
            with pytest.raises(UserError, match=line) as error, owning(out, part, Team.alone()):
                pass
            assert "\n" not in str(error.value)
    with owning(out, WHOLE, Team.alone()):
        pass
    assert not any(out.iterdir())


def test_jobs_that_refine_a_group_each_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    with another_job(tmp_path, "Part('refine', 0)") as job:
        with owning(tmp_path, Part("refine", 1), Team.alone()):
            pass
        for part in (WHOLE, Part("refine", 0), Part("average"), Part("large_batch")):
            with pytest.raises(UserError, match=f"process {job.pid} "), owning(tmp_path, part, Team.alone()):
                pass


def test_what_a_killed_job_left_is_no_obstacle(tmp_path: Path) -> None:
    with another_job(tmp_path, "Part()") as job:
        job.kill()
        job.wait()
        assert (tmp_path / ".lock").is_file()
        with owning(tmp_path, WHOLE, Team.alone()):
            pass
    assert not any(tmp_path.iterdir())


def test_a_job_waits_for_itself_to_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a batch system starts a job again while its old processes are still dying."""
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with another_job(tmp_path, "Part()") as job:
        monkeypatch.setattr(lock.time, "sleep", lambda _: job.stdin and (job.stdin.write("\n"), job.stdin.flush()))
        with owning(tmp_path, WHOLE, Team.alone()):
            pass
