"""Two jobs of a user in one folder: one trains, the other ends with one line."""

import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from launch import BIN, launch, wait_for
from owners import ENDLESS, FIELDS, end_of, saves, start, suspend

from swap_hpc.run.owner import Owner


def test_a_signal_ends_the_wait_for_an_owner(tmp_path: Path) -> None:
    """That owner was on another host, and its time to show that it lives is not over."""
    owner = tmp_path / "out" / ".owner"
    owner.parent.mkdir()
    owner.write_text(Owner(host="n1", process=1).to_json())
    job = launch(BIN / "swap-hpc", "train", "digits", *FIELDS, "--out", owner.parent)
    assert job.stdout
    wait_for(lambda: job.stdout and "waiting for a sign" in job.stdout.readline(), "wait", 0)
    job.terminate()
    done = end_of(job)
    assert done.code == 75, done.stderr
    assert f"stopped on request, before this job had {owner.parent}: start" in done.stdout
    assert [*owner.parent.iterdir()] == [owner]


def hidden(out: Path) -> list[str]:
    return [path.name for path in out.rglob(".*")]


@pytest.mark.parametrize("times", range(3))
def test_of_two_jobs_that_start_together_one_trains(tmp_path: Path, times: int) -> None:
    out = tmp_path / "out"
    jobs = [start(out, *ENDLESS) for _ in range(2)]
    wait_for(lambda: any(job.poll() is not None for job in jobs) and saves(out), "one owner")
    (refused,) = [job for job in jobs if job.poll() is not None]
    (owner,) = [job for job in jobs if job is not refused]
    done = end_of(refused)
    message = rf"swap-hpc: {out} is in use by process {owner.pid} on \S+: wait for it, or choose"
    assert done.code == 2 and len(done.ours) == 1, done.stderr
    assert re.match(message, done.ours[0])
    owner.terminate()
    assert end_of(owner).code == 75
    assert hidden(out) == []


def test_a_job_that_was_replaced_while_it_stood_still_ends_and_writes_nothing(
    tmp_path: Path,
) -> None:
    """The other job runs on a host of another name, and does not see the first one's process."""
    other_host = ("unshare", "--uts", "sh", "-c", 'hostname other && exec "$@"', "-")
    unshared = subprocess.run([*other_host, "true"], capture_output=True, text=True, check=False)
    if unshared.returncode:
        pytest.skip(f"no host of another name can be made here: {unshared.stderr.strip()}")
    out = tmp_path / "out"
    first = start(out, *ENDLESS)
    wait_for(lambda: saves(out), "save of the refinement")
    suspend(first)
    second = start(out, *ENDLESS, before=other_host)
    before = saves(out)
    wait_for(lambda: saves(out) != before, "save of the second job")
    suspend(second)
    names = saves(out), hidden(out)
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    first.send_signal(signal.SIGCONT)
    done = end_of(first)
    line = (
        f"swap-hpc: {out} was taken over by process {second.pid} on other while this job stood "
        "still: it ends here, and writes nothing more"
    )
    assert done.code == 3 and done.ours == [line], done.stderr
    assert (saves(out), hidden(out)) == names
    assert subprocess.run(["diff", "-r", out, copy], check=False).returncode == 0
    second.send_signal(signal.SIGCONT)
    second.terminate()
    done = end_of(second)
    assert done.code == 75 and hidden(out) == [], done.stderr
    assert f"{out} was left by process {first.pid} on" in done.stdout
