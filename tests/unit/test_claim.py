"""What a start finds in a run's folder: nothing trained, or a run of another recipe."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from swap_hpc.errors import UserError
from swap_hpc.recipe.phase import refinement_of
from swap_hpc.run.claim import check_data, claim, finished, leftovers, take_over
from swap_hpc.run.own_files import remove_files
from swap_hpc.run.weights import write_tensors

OTHER = tiny.recipe(seed=7)
FACTS: dict[str, Any] = {"ranks": [{"host": "here"}]}


def failed_start(out: Path) -> None:
    """Leave what a start of `OTHER` leaves that fails in its first epoch."""
    claim(OTHER, out, None, FACTS)
    for name in (
        "metrics/world.jsonl",
        "metrics/.world.jsonl.host.12",
        "tensorboard/world/events.out.tfevents.1",
        "tracking/world.json",
        "environment-group-000.json",
        "diverged.json",
        "checkpoints/large_batch-best-00001.safetensors",
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text('{"ranks": []}')


def test_a_start_that_saved_nothing_does_not_lock_its_folder(tmp_path: Path) -> None:
    failed_start(tmp_path)
    assert take_over(OTHER, tmp_path, None) == "" and (tmp_path / "metrics/world.jsonl").exists()
    assert finished(tiny.recipe(), tmp_path) is None
    with pytest.raises(
        UserError, match=r"another recipe \(seed differ\), whose jobs may be running"
    ):
        take_over(tiny.recipe(), tmp_path, refinement_of(0))  # shares the folder with other jobs
    line = take_over(tiny.recipe(), tmp_path, None)
    assert line.startswith(f"{tmp_path} held a start of another recipe (seed differ) that had sa")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints/large_batch-00001-0000000.safetensors",
        "large_batch.safetensors",
        "snapshots/large_batch-00001.safetensors",
        "result.json",
    ],
)
def test_what_was_trained_is_kept_from_another_recipe(name: str, tmp_path: Path) -> None:
    failed_start(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"holds a run of another recipe \(seed differ\)"):
        finished(tiny.recipe(), tmp_path)
    assert take_over(tiny.recipe(), tmp_path, None) == ""
    assert (tmp_path / "metrics/world.jsonl").exists()


USERS = ("checkpoints/teacher.pt", "metrics/notes.txt", "tensorboard/other/events.1", "a.txt")


def files(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def put(out: Path, *names: str) -> dict[Path, bytes]:
    """Write small files, and return their content."""
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    return {out / name: b"mine" for name in names}


def test_a_start_takes_over_no_file_of_its_user(tmp_path: Path) -> None:
    failed_start(tmp_path)
    mine = put(tmp_path, *USERS)
    assert "takes the folder over" in take_over(tiny.recipe(), tmp_path, None)
    assert files(tmp_path) == mine | {tmp_path / "recipe.toml": OTHER.to_toml().encode()}
    assert not (tmp_path / "tracking").exists()


@pytest.mark.parametrize("weights", ["none", "of another program"])
def test_a_recipe_that_no_run_has_written_is_neither_taken_over_nor_overwritten(
    weights: str, tmp_path: Path
) -> None:
    put(tmp_path, *USERS)
    (tmp_path / "environment.json").write_text('{"name": "a Python environment"}')
    (tmp_path / "recipe.toml").write_text("# by hand\n" + OTHER.to_toml())
    if weights == "of another program":
        put(tmp_path, "teacher.safetensors")
    before = files(tmp_path)
    for recipe in (tiny.recipe(), OTHER):
        with pytest.raises(UserError, match=r"recipe.toml was not written by a run, and this run"):
            finished(recipe, tmp_path)
    assert take_over(tiny.recipe(), tmp_path, None) == ""
    assert files(tmp_path) == before
    (tmp_path / "recipe.toml").write_text(OTHER.to_toml())  # which a run writes alike
    assert finished(OTHER, tmp_path) is None


@pytest.mark.parametrize("keep", [True, False])
def test_a_complete_run_keeps_the_saves_that_its_own_recipe_keeps(
    keep: bool, tmp_path: Path
) -> None:
    claim(tiny.recipe(checkpoint={"keep": keep}), tmp_path, None, FACTS)
    names = [f"checkpoints/large_batch-{epoch:05d}-0000000.safetensors" for epoch in (1, 2)]
    put(tmp_path, *names, *USERS)
    assert not leftovers(tmp_path)  # the run is not complete
    put(tmp_path, "result.json")
    remove_files(leftovers(tmp_path))
    assert [(tmp_path / name).exists() for name in names] == [False, keep]
    assert all((tmp_path / name).exists() for name in USERS)


@pytest.mark.parametrize("saved", [False, True])
def test_candidates_for_the_best_checkpoint_bind_no_run_to_its_data(
    saved: bool, tmp_path: Path
) -> None:
    job = tiny.job()
    other = replace(job.identity, classes=("x", "y", "z")).to_json()
    names = ["large_batch-best-00001"] + ["large_batch-00001-0000000"] * saved
    for name in names:
        path = tmp_path / f"checkpoints/{name}.safetensors"
        write_tensors(path, {"w": torch.ones(1)}, job.header | {"data": other})
    with (
        pytest.raises(UserError, match="large_batch-00001-0000000.safetensors was saved with oth")
        if saved
        else nullcontext()
    ):
        check_data(job, tmp_path)
