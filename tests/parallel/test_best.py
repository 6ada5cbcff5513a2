"""The best checkpoint: the epoch that the journal says, resumed and killed as well."""

import json
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from safetensors.torch import load_file

from swap_hpc.errors import Stopped, UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.loading import parse
from swap_hpc.recipe.schema import Recipe
from swap_hpc.train.control import Control

PARTS = ("large_batch", "group-000", "group-001")


def recipe(**data: int) -> Recipe:
    """Return a recipe whose validation accuracy goes up and down: its rates are high."""
    return parse(
        {
            "groups": 2,
            "device": "cpu",
            "model": {"name": "tiny:batch_normed"},
            "data": {"name": "digits", **data},
            "large_batch": {"batch_size": 64, "epochs": 5, "learning_rate": 0.3},
            "refine": {"batch_size": 32, "epochs": 3, "cycles": 2, "learning_rate": 0.3},
            "batchnorm": {"batch_size": 128, "samples": 256},
            "checkpoint": {"best": True, "snapshots": 1, "epochs": 2, "min_seconds": 0},
        }
    )


class Killed(Exception):
    """Stands for the end of a process."""


class Fatal(Control):
    """A control of a rank that ends at a step, without saving."""

    def __init__(self, where: str):
        super().__init__()
        self.where = where

    def heartbeat(self, where: str) -> None:
        super().heartbeat(where)
        if self.where in where:
            raise Killed(where)


def best_by_hand(run: Path, part: str) -> tuple[int, float]:
    name = "world" if part == "large_batch" else part
    text = (run / "metrics" / f"{name}.jsonl").read_text().splitlines()
    epochs = [line for line in map(json.loads, text) if "cycle" in line]
    best = max(epochs, key=lambda line: (line["validation_accuracy"], -line["epoch"]))
    return best["epoch"], best["validation_accuracy"]


def check_best(run: Path, result: dict[str, Any]) -> None:
    """Each part's best weights are the snapshot of its best epoch, and the result says which."""
    assert [*result["best"]] == [*PARTS]
    for part in PARTS:
        epoch, value = best_by_hand(run, part)
        assert result["best"][part] == {"epoch": epoch, "validation_accuracy": value}
        kept = load_file(run / f"{part}-best.safetensors")
        snapshot = load_file(run / "snapshots" / f"{part}-{epoch:05d}.safetensors")
        assert kept.keys() == snapshot.keys()
        assert all(torch.equal(kept[name], tensor) for name, tensor in snapshot.items())
    assert not (run / "checkpoints").exists()


def same_files(one: Path, other: Path, name: str) -> bool:
    left, right = load_file(one / name), load_file(other / name)
    return all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.ranks(1, 2)
def test_the_best_checkpoint_is_that_of_the_journal(world: Team, tmp_path: Path) -> None:
    folder = Path(world.broadcast(str(tmp_path)))
    whole, broken = folder / "whole", folder / "broken"
    result = fuzz.train(recipe(validation=200), whole, world)
    assert result
    check_best(whole, result)
    plain = parse({**recipe(validation=200).model_dump(mode="json"), "checkpoint": {}})
    without = fuzz.train(plain, folder / "plain", world)
    assert without and without["weights_sha256"] == result["weights_sha256"]
    assert "best" not in without
    # killed between saves, with candidates after the last one, then asked to stop, then resumed
    for where in ("large batch, epoch 4, step 2", "epoch 6, step 3"):
        with pytest.raises(Killed):
            fuzz.train(recipe(validation=200), broken, world, Fatal(where))
    with pytest.raises(Stopped):
        fuzz.train(recipe(validation=200), broken, world, fuzz.asked_at(9))
    again = fuzz.train(recipe(validation=200), broken, world)
    assert again and again["best"] == result["best"]
    check_best(broken, again)
    for part in PARTS:
        assert same_files(whole, broken, f"{part}-best.safetensors")
    with pytest.raises(UserError, match="chooses by validation samples, and the data have none"):
        fuzz.train(recipe(), folder / "none", world)
