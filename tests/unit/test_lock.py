"""A run's folder has one owner. A job that died owns nothing; one that lost it writes nothing.

`test_races.py` starts jobs at the same moment.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.atomic import append_text, write_text
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1, Part, Phase, refinement_of
from swap_hpc.run import lock
from swap_hpc.run.lock import owning
from swap_hpc.run.owner import Owner, this_process
from swap_hpc.run.owner_file import OwnerFile
from swap_hpc.run.taking import AT_ONCE, Rhythm, Taking

ALONE = Team.alone()
SHORT = Rhythm(heartbeat=0.05, patience=0.3, standstill=1.0)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RHYTHM", SHORT)


def test_a_second_job_ends_with_a_line_that_names_the_first(tmp_path: Path) -> None:
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


def test_jobs_that_refine_a_group_each_share_a_folder(tmp_path: Path) -> None:
    with owning(tmp_path, refinement_of(0), ALONE):
        with owning(tmp_path, refinement_of(1), ALONE):
            pass
        for part in (None, refinement_of(0), Part(Phase.AVERAGE), PHASE_1):
            names_owner = pytest.raises(UserError, match=f"process {os.getpid()} ")
            with names_owner, owning(tmp_path, part, ALONE):
                pass
    assert not any(tmp_path.iterdir())


HOLDER = """
import sys
from pathlib import Path
from swap_hpc.run.owner import this_process
from swap_hpc.run.taking import Rhythm, Taking

Taking(Path(sys.argv[1]), None, this_process(), Rhythm(), say=print).take()
print("has it", flush=True)
input()  # until it is killed
"""


@pytest.mark.parametrize("part", [None, refinement_of(0)])
def test_the_file_of_a_killed_job_is_no_obstacle(part: Part | None, tmp_path: Path) -> None:
    """Not even before its parent has noticed its end."""
    pipe = subprocess.PIPE
    line = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True) as job:
        assert job.stdout and job.stdout.readline() == "has it\n"
        with pytest.raises(UserError, match=f"in use by process {job.pid} on"):
            Taking(tmp_path, part, this_process(), AT_ONCE, say=print).take()
        job.kill()
        with owning(tmp_path, part, ALONE):
            pass
        job.wait()
    assert not any(tmp_path.iterdir())


def elsewhere(job: str = "", restarts: int = 0) -> Owner:
    """Return an owner on another host."""
    return replace(this_process(), host="n1", job=job, restarts=restarts)


def left_in(out: Path, owner: Owner) -> OwnerFile:
    """Write the file of an owner into a folder."""
    file = OwnerFile(out / ".owner")
    assert file.take(owner, None)
    return file


@contextmanager
def beating(file: OwnerFile) -> Iterator[None]:
    """Let the owner that a file names show its life; its clock is years late."""
    over = threading.Event()

    def beat() -> None:
        seconds = 0
        while not over.wait(0.05):
            seconds += 1
            os.utime(file.path, (seconds, seconds))

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    over.set()
    thread.join()


def test_an_owner_on_another_host_is_alive_while_its_heartbeat_changes(tmp_path: Path) -> None:
    told: list[str] = []
    file = left_in(tmp_path, elsewhere())
    line = f"{tmp_path} is in use by process {os.getpid()} on n1: wait for it"
    with beating(file), pytest.raises(UserError, match=line):
        Taking(tmp_path, None, this_process(), SHORT, told.append).take()
    own = Taking(tmp_path, None, this_process(), SHORT, told.append).take()
    assert own == file and len(told) == 2
    assert f"was left by process {os.getpid()} on n1, or is in use by it" in told[1]


def test_a_job_that_was_put_back_into_the_queue_goes_on_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on another node, and though its former processes may still be ending there."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    file = left_in(tmp_path, elsewhere(job="4711"))
    with beating(file), owning(tmp_path, None, ALONE, rhythm=AT_ONCE):
        pass
    left_in(tmp_path, elsewhere(job="4711", restarts=1))  # a second step of this very job
    refused = pytest.raises(UserError, match="on n1, job 4711: wait for it")
    with refused, owning(tmp_path, None, ALONE, rhythm=AT_ONCE):
        pass
    (tmp_path / ".owner").unlink()
    left_in(tmp_path, elsewhere(job="other_cluster 4711"))
    with refused, owning(tmp_path, None, ALONE, rhythm=AT_ONCE):
        pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_owner_that_was_replaced_writes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heartbeat ends the process, unless one of its writes notices it first."""
    ended = threading.Event()
    lines: list[str] = []

    def end(line: str) -> None:
        lines.append(line)
        ended.set()
        raise SystemExit  # of the thread

    monkeypatch.setattr(lock, "fail_in_thread", end)
    out, beside = tmp_path / "run", tmp_path / "beside"
    file = OwnerFile(out / ".owner")
    with owning(out, None, ALONE):
        write_text(out / "result.json", "mine")
        seen = file.look()
        assert seen and file.take(elsewhere(), seen.owner)
        lost = f"{out} was taken over by process {os.getpid()} on n1 while this job stood still"
        for write in (write_text, append_text):
            with pytest.raises(RunError, match=lost):
                write(out / "result.json", "more")
        write_text(beside, "elsewhere a process may write")
        assert ended.wait(60) and lines[0].startswith(f"swap-hpc: {lost}")
    assert (out / "result.json").read_text() == "mine" and beside.exists()
    assert sorted(path.name for path in out.iterdir()) == [".owner", "result.json"]


def test_the_heartbeat_needs_no_room_on_the_disk(tmp_path: Path) -> None:
    file = left_in(tmp_path, this_process())
    before = file.look()
    os.utime(file.path, (0, 0))
    file.beat()
    after = file.look()
    assert before and after and before.owner == after.owner and after.heartbeat > 10**18
