"""A job that does not own its folder any more changes nothing in it: it removes nothing, either."""

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import tiny

from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.atomic import guarding, write_whole
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1
from swap_hpc.run.best import BestKeeper
from swap_hpc.run.board import Board
from swap_hpc.run.checkpoint import Checkpoints
from swap_hpc.run.claim import claim, leftovers, noting_divergence
from swap_hpc.run.extend import extend
from swap_hpc.run.own_files import remove_files
from swap_hpc.run.watchdog import _SignsOfLife
from swap_hpc.train.events import Position, SavePoint
from swap_hpc.train.fit import fit

ONE = Team.alone()
JOB = tiny.job(large_batch={"epochs": 2})
RECIPE = JOB.recipe
BESIDE = (
    ".owner",
    ".result.json.host.12",
    "diverged.json",
    "environment.json",
    "group-000.safetensors",
    "checkpoints/large_batch-best-00007.safetensors",
    "tensorboard/world/events.out.tfevents.1",
)


def lost() -> NoReturn:
    raise RunError("lost")


def content(out: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two saves, of which the newer one is damaged, and what lies beside them."""
    folder = tmp_path_factory.mktemp("out")
    saves = Checkpoints(folder / "checkpoints", RECIPE)
    for event in fit(tiny.model(JOB), JOB, PHASE_1, ONE):
        if isinstance(event, SavePoint) and event.due:
            saves.save(event, {}, ONE)
    newest = max((folder / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    for name in BESIDE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"ranks": []}')
    (folder / "result.json").write_text("{}")
    (folder / "recipe.toml").write_text(RECIPE.to_toml())
    return folder


def forget_after(out: Path) -> None:
    Checkpoints(out / "checkpoints", RECIPE).forget_after(Position(0, 0), PHASE_1, ONE)


def set_the_damaged_aside(out: Path) -> None:
    Checkpoints(out / "checkpoints", RECIPE).load(PHASE_1, ONE)


def forget_divergence(out: Path) -> None:
    with noting_divergence(out, None):
        pass


def forget_candidates(out: Path) -> None:
    keeper = BestKeeper(out, out / "checkpoints", RECIPE.metrics[0], {})
    keeper.resume(PHASE_1, [], ONE)


CHANGES: dict[str, Callable[[Path], object]] = {
    "what a complete run leaves": lambda out: remove_files(leftovers(out)),
    "saves": forget_after,
    "a damaged save": set_the_damaged_aside,
    "a note": forget_divergence,
    "candidates": forget_candidates,
    "a claim": lambda out: claim(RECIPE, out, None, {}),
    "curves": lambda out: Board(out / "tensorboard", RECIPE).begin("world", [], 0),
    "an extended run": lambda out: extend({}, RECIPE, RECIPE, out),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_job_that_lost_its_folder_removes_nothing(what: str, out: Path) -> None:
    before = content(out)
    with guarding(out, lost), pytest.raises((RunError, UserError), match="^lost"):
        CHANGES[what](out)
    assert content(out) == before


def test_a_job_that_lost_its_folder_shows_no_sign_of_life(tmp_path: Path) -> None:
    signs = _SignsOfLife(tmp_path / "rank-00000.alive", tmp_path / "rank-00001.alive", [])
    with guarding(tmp_path, lost):
        signs.give("the start", is_waiting=False)
    assert not any(tmp_path.iterdir())
    signs.give("the start", is_waiting=False)
    assert any(tmp_path.iterdir())


def test_who_has_lost_a_folder_is_told_so_and_not_what_has_become_of_a_file(tmp_path: Path) -> None:
    """The new owner removes what the one before it has half written."""

    def write(temporary: Path) -> None:
        temporary.touch()
        temporary.unlink()

    with guarding(tmp_path, lost), pytest.raises(RunError, match="^lost$"):
        write_whole(tmp_path / "file", write)
