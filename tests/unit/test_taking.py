"""Waits for the owners of a folder: who counts as dead, who as alive, and what ends a wait.

`test_lock.py` has the owner's side; the waits of several ranks are in `parallel/test_owning.py`.
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from swap_hpc.errors import Stopped, UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import Part, refinement_of
from swap_hpc.run.lock import owning
from swap_hpc.run.owner import Owner, this_process
from swap_hpc.run.owner_file import OwnerFile
from swap_hpc.run.taking import AT_ONCE, Rhythm, Taking, own_file

ALONE = Team.alone()
FOREVER = Rhythm(patience=1e6, standstill=1e6)


def on(host: str) -> Owner:
    return replace(this_process(), host=host)


def left_by(owner: Owner, out: Path, part: Part | None = None) -> OwnerFile:
    """Write an owner's file into a folder."""
    file = own_file(out, part)
    assert file.take(owner, None)
    return file


def test_an_owner_that_follows_another_is_no_heartbeat_of_it(tmp_path: Path) -> None:
    """Of jobs that each refine a group, one removes the file that a job of the whole run left."""
    dead, other = on("n0"), on("n1")
    file = left_by(dead, tmp_path)
    rhythm = Rhythm(patience=0.1, standstill=1e6)
    turns = Taking(tmp_path, refinement_of(0), this_process(), rhythm, say=str).turns()
    next(turns)
    time.sleep(0.2)  # longer than the patience with an owner that is alive
    assert file.take(other, dead)
    next(turns)  # is not refused
    file.release(other)
    assert list(turns) == []
    assert [path.name for path in tmp_path.iterdir()] == [".owner-group-000"]


def test_owners_of_several_groups_are_waited_for_at_the_same_time(tmp_path: Path) -> None:
    for group in range(8):
        left_by(on("n1"), tmp_path, refinement_of(group))
    told: list[str] = []
    rhythm = Rhythm(standstill=0.2)
    number = 0
    for _ in Taking(tmp_path, None, this_process(), rhythm, told.append).turns():
        number += 1
        time.sleep(0.3)  # longer than a standstill of all that have been looked at
    assert number == 1
    assert len(told) == 1 and "on n1 and 7 more, or is in use by them" in told[0]
    assert [path.name for path in tmp_path.iterdir()] == [".owner"]


def test_a_copy_of_a_running_run_can_be_continued(tmp_path: Path) -> None:
    """Its owner's process runs on this host, but works in the other folder."""
    out, copy = tmp_path / "out", tmp_path / "copy"
    with owning(out, None, ALONE):
        shutil.copytree(out, copy)
        with owning(copy, None, ALONE, rhythm=Rhythm(standstill=0.2)):
            assert (out / ".owner").exists() and (copy / ".owner").exists()
        assert (out / ".owner").exists()


def test_an_owner_that_runs_on_this_host_needs_no_heartbeat(tmp_path: Path) -> None:
    """It may be suspended, or write a large file."""
    Taking(tmp_path, None, this_process(), FOREVER, say=str).take()
    rhythm = Rhythm(patience=0.5, standstill=0.0)
    with pytest.raises(UserError, match="is in use by"):
        Taking(tmp_path, None, this_process(), rhythm, say=str).take()


@pytest.mark.parametrize("part", [None, refinement_of(1)])
def test_a_stop_ends_the_wait_and_leaves_the_folder_as_it_was(
    part: Part | None, tmp_path: Path
) -> None:
    left_by(on("n1"), tmp_path)
    stopped = pytest.raises(Stopped, match=f"before this job had {tmp_path}: start it again")
    rhythm = Rhythm(standstill=1e6, watch=30.0)
    with stopped, owning(tmp_path, part, ALONE, rhythm=rhythm, stop=lambda: True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".owner"]


def test_a_job_knows_its_own_claim_that_an_old_view_of_the_folder_hid(tmp_path: Path) -> None:
    dead, me = on("n1"), this_process()
    file = left_by(dead, tmp_path)
    (tmp_path / f".owner.{dead.key}").write_text(me.to_json())
    Taking(tmp_path, None, me, AT_ONCE, say=str).take()
    assert file.is_owned_by(me)
    file.release(me)
    assert not any(tmp_path.iterdir())


def test_a_refusal_by_the_system_names_the_folder_and_no_hidden_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *how: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("swap_hpc.run.owner_file.os.open", refuse)
    line = f"^cannot write {tmp_path}: Permission denied: choose another --out$"
    with pytest.raises(UserError, match=line), owning(tmp_path, None, ALONE):
        pass
