"""A complete run that is extended ends like one that was longer from its beginning."""

import json
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import tiny
from rich.console import Console

from swap_hpc.errors import RunError, Stopped, UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.schema import Recipe
from swap_hpc.run import extend as extending
from swap_hpc.run import run as running
from swap_hpc.run.extend import check_extension
from swap_hpc.run.run import train
from swap_hpc.train.control import Control

CONSTANT: dict[str, Any] = {"learning_rate": 0.05}


def recipe(phase: str, keep: bool = True, **fields: Any) -> Recipe:
    """Return a recipe of two groups with a momentum, in which one phase has other fields."""
    fixed: dict[str, Any] = {
        "groups": 2,
        "model": {"name": "tiny:normed"},
        "data": {"name": "synthetic", "samples": 96, "image_size": 8},
        "augment": {"pad": 0, "cutout": 0},
        "batchnorm": {"batch_size": 20, "samples": 80},
        "checkpoint": {"min_seconds": 0, "keep": keep},
    }
    return tiny.recipe(**fixed | {phase: fields} | ({} if phase == "refine" else NO_REFINEMENT))


NO_REFINEMENT = {"refine": {"epochs": 0}}


def run(made: Recipe, out: Path, extends: Recipe | None = None, control: Any = None) -> Any:
    if extends:
        check_extension(extends, made)
    console = Console(quiet=True)
    chosen = control or Control()
    started = perf_counter()
    return train(made, out, Team.world(), console, chosen, started, extends=extends)


def figures(out: Path, result: Any) -> dict[str, Any]:
    """Return all that two equal runs have in common."""
    lines = {
        file.name: [
            {key: value for key, value in json.loads(line).items() if "_loss" in key}
            for line in file.read_text().splitlines()
        ]
        for file in (out / "metrics").iterdir()
    }
    same = ("weights_sha256", "test_accuracy", "test_loss", "epochs", "cycles")
    return {key: result[key] for key in same} | lines


LONGER = {
    "epochs": ("refine", {"epochs": 2, **CONSTANT}, {"epochs": 4, **CONSTANT}),
    "knots that agree": (
        "refine",
        {"epochs": 2, "learning_rate": [[0, 0.1], [2, 0.05]]},
        {"epochs": 3, "learning_rate": [[0, 0.1], [2, 0.05], [3, 0.0]]},
    ),
    "evaluations of the average": (
        "refine",
        {"epochs": 2, "evaluate_average": 1, **CONSTANT},
        {"epochs": 4, "evaluate_average": 1, **CONSTANT},
    ),
    "cycles": ("refine", {"epochs": 2, "cycles": 1}, {"epochs": 2, "cycles": 3}),
    "phase 1 alone": ("large_batch", {"epochs": 2, **CONSTANT}, {"epochs": 3, **CONSTANT}),
}


@pytest.mark.parametrize("case", LONGER)
def test_an_extended_run_ends_like_a_longer_one_to_the_bit(case: str, tmp_path: Path) -> None:
    phase, short, long = LONGER[case]
    before, after = recipe(phase, **short), recipe(phase, **long)
    whole = figures(tmp_path / "whole", run(after, tmp_path / "whole"))
    out = tmp_path / "run"
    first = run(before, out)
    assert first["weights_sha256"] != whole["weights_sha256"]
    extended = run(after, out, before)
    assert figures(out, extended) == whole
    kept = json.loads((out / "result-before.json").read_text())
    assert kept["weights_sha256"] == first["weights_sha256"]
    final = "swap" if phase == "refine" else "large_batch"
    assert (out / f"{final}-before.safetensors").is_file()
    assert run(after, out, before) == extended == run(after, out)  # nothing is left to do


def test_an_extension_that_was_stopped_is_started_again_by_the_same_line(tmp_path: Path) -> None:
    phase, short, long = LONGER["epochs"]
    before, after = recipe(phase, **short), recipe(phase, **long)
    whole = run(after, tmp_path / "whole")
    run(before, tmp_path / "run")
    control = Control()

    def heartbeat(where: str) -> None:
        control.stop = control.stop or "epoch 4, step 2" in where

    control.heartbeat = heartbeat  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        run(after, tmp_path / "run", before, control)
    longest = recipe(phase, **long | {"epochs": 6})
    with pytest.raises(UserError, match=r"group-001.* is not the end of this run: end it first"):
        run(longest, tmp_path / "run", after)
    # which has changed no save
    resumed = run(after, tmp_path / "run", before)
    assert resumed["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.parametrize(
    ("function", "calls"), [("write_tensors", 2), ("_rename", 2), ("write_text", 1)]
)
def test_an_extension_that_broke_off_at_any_place_is_made_again(
    function: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase, short, long = LONGER["epochs"]
    before, after = recipe(phase, **short), recipe(phase, **long)
    whole = run(after, tmp_path / "whole")
    run(before, tmp_path / "run")
    original, seen = getattr(extending, function), []

    def broken(*arguments: Any) -> None:
        seen.append(arguments)
        if len(seen) == calls:
            raise RunError("the disk is full")
        original(*arguments)

    with monkeypatch.context() as patched, pytest.raises(RunError, match="the disk is full"):
        patched.setattr(extending, function, broken)
        run(after, tmp_path / "run", before)
    extended = run(after, tmp_path / "run", before)
    assert extended["weights_sha256"] == whole["weights_sha256"]


def contents(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("check", ["check_data", "check_tracker", "dry_step", "saved_averages"])
@pytest.mark.parametrize("case", ["epochs", "phase 1 alone"])
def test_an_extension_that_cannot_begin_leaves_the_folder_as_it_was(
    check: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase, short, long = LONGER[case]
    before, after = recipe(phase, **short), recipe(phase, **long)
    run(before, tmp_path)
    there = contents(tmp_path)

    def refuse(*_: Any) -> None:
        raise UserError("not like this")

    with monkeypatch.context() as patched, pytest.raises(UserError, match="not like this"):
        patched.setattr(running, check, refuse)
        run(after, tmp_path, before)
    assert contents(tmp_path) == there


def test_what_was_made_of_the_shorter_run_gets_another_name(tmp_path: Path) -> None:
    phase, short, long = LONGER["epochs"]
    before, after = recipe(phase, **short), recipe(phase, **long)
    run(before, tmp_path)
    names = ["average.safetensors", "average-0-1.safetensors", "landscape.json", "report.md"]
    for name in names:
        (tmp_path / name).write_text(name)
    run(after, tmp_path, before)
    for name in names:
        path = tmp_path / name
        assert not path.exists()
        assert path.with_name(f"{path.stem}-before{path.suffix}").read_text() == name


def test_what_would_not_end_alike_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    decaying = recipe("refine", epochs=2, learning_rate=[[0, 0.1], [2, 0.0]])
    other = recipe("refine", epochs=4, learning_rate=[[0, 0.1], [4, 0.0]])
    run(decaying, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = r"the learning rate of epoch 1, which is trained already, was 0.09375 and would be"
    with pytest.raises(UserError, match=message):
        run(other, tmp_path, decaying)
    idle = recipe("refine", epochs=4, learning_rate=[[0, 0.1], [2, 0.0]])
    with pytest.raises(UserError, match="the learning rate is 0 in all epochs after epoch 2: give"):
        run(idle, tmp_path, decaying)
    longer = [[0, 0.1], [2, 0.0], [3, 0.1]]
    gone = recipe("refine", epochs=3, learning_rate=longer, keep=False)
    assert {path: path.read_bytes() for path in before} == before
    run(decaying.model_copy(update={"checkpoint": gone.checkpoint}), tmp_path)  # is complete
    assert contents(tmp_path) == before
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"holds no save of large_batch: .* checkpoint.keep = true"):
        run(gone, tmp_path, decaying)
    differ = r"holds a run of another recipe \(refine.batch_size, refine.learning_rate differ"
    other_short = recipe("refine", epochs=2, batch_size=6, learning_rate=0.1)
    other_long = recipe("refine", epochs=4, batch_size=6, learning_rate=0.1)
    with pytest.raises(UserError, match=differ):
        run(other_long, tmp_path, other_short)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (("refine", {"epochs": 2}), ("refine", {"epochs": 2}), "has 2 epochs already"),
        (("refine", {"epochs": 3}), ("refine", {"epochs": 2}), "has 3 epochs already"),
        (
            ("refine", {"epochs": 2, "cycles": 2}),
            ("refine", {"epochs": 3, "cycles": 2}),
            "a run of 2 cycles is extended by refine.cycles",
        ),
        (
            ("refine", {"epochs": 2, "average_every_steps": 2}),
            ("refine", {"epochs": 3, "average_every_steps": 2}),
            "such a run cannot be extended",
        ),
        (
            ("large_batch", {"stop_accuracy": 0.9}),
            ("large_batch", {"stop_accuracy": 0.9, "epochs": 5}),
            "stop_accuracy ends phase 1",
        ),
        (
            ("large_batch", {}),
            ("large_batch", {"batch_size": 12, "epochs": 5}),
            "--extend large_batch.batch_size: this run is extended by large_batch.epochs, large",
        ),
    ],
)
def test_recipes_that_cannot_be_extended_are_refused(one: Any, other: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_extension(recipe(one[0], **one[1]), recipe(other[0], **other[1]))
