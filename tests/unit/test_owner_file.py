"""The owner's file on file systems that lose answers, show files late, or lack hard links."""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from swap_hpc.errors import RunError
from swap_hpc.run import owner_file
from swap_hpc.run.lock import _Keeper
from swap_hpc.run.owner import this_process
from swap_hpc.run.owner_file import OwnerFile

ME = this_process()
DEAD = replace(this_process(), host="n1")


def refused(number: int) -> Callable[..., None]:
    """Return a function of the system that fails."""

    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("dead", [None, DEAD])
@pytest.mark.parametrize("number", owner_file.WITHOUT_LINKS)
def test_a_file_has_one_owner_where_there_are_no_hard_links(
    number: int, dead: owner_file.Owner | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refused(number))
    file = OwnerFile(tmp_path / ".owner")
    if dead:
        assert file.take(dead, None)
    other = this_process()
    assert file.take(ME, dead) and not file.take(other, dead)
    assert file.is_owned_by(ME)
    assert [path.name for path in tmp_path.iterdir()] == [".owner"]
    file.release(ME)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dead", [None, DEAD])
def test_a_link_counts_though_the_answer_of_the_server_was_lost(
    dead: owner_file.Owner | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = OwnerFile(tmp_path / ".owner")
    if dead:
        assert file.take(dead, None)
    link = owner_file._link

    def unanswered(draft: Path, path: Path) -> bool:
        link(draft, path)
        return False

    monkeypatch.setattr(owner_file, "_link", unanswered)
    assert file.take(ME, dead) and file.is_owned_by(ME)
    assert [path.name for path in tmp_path.iterdir()] == [".owner"]


def test_a_file_that_another_host_has_just_replaced_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = OwnerFile(tmp_path / ".owner")
    assert file.take(ME, None)
    stale, fstat = iter(range(2)), os.fstat

    def fail_twice(descriptor: int) -> os.stat_result:
        if next(stale, None) is not None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return fstat(descriptor)

    monkeypatch.setattr(os, "fstat", fail_twice)
    assert file.is_owned_by(ME) and next(stale, None) is None


def test_the_heartbeat_is_seen_where_times_cannot_be_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = OwnerFile(tmp_path / ".owner")
    assert file.take(ME, None)
    os.utime(file.path, (0, 0))
    monkeypatch.setattr(os, "utime", refused(errno.EPERM))
    file.beat()
    seen = file.look()
    assert seen and seen.owner == ME and seen.heartbeat > 10**18


def test_a_rank_checks_as_soon_as_it_has_seen_the_file(tmp_path: Path) -> None:
    """A file system may show it late, and a host may have another folder of that name."""
    file = OwnerFile(tmp_path / ".owner")
    keeper = _Keeper(file, ME, seconds=1.0)
    keeper.check()
    assert file.take(DEAD, None)
    keeper.check()
    assert file.take(ME, DEAD)
    keeper.check()
    file.release(ME)
    with pytest.raises(RunError, match="writes nothing more"):
        keeper.check()
