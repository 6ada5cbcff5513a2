"""A run that begins with the phase 1 of another run."""

import json
from pathlib import Path
from time import perf_counter
from typing import Any

import tiny
from rich.console import Console

from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.schema import Recipe
from swap_hpc.run.run import train
from swap_hpc.train.control import Control


def recipe(epochs: int) -> Recipe:
    """Return a recipe with validation samples and this many epochs of refinement."""
    return tiny.recipe(
        data={"name": "synthetic", "samples": 96, "image_size": 8, "validation": 30},
        augment={"pad": 0, "cutout": 0},
        batchnorm={"batch_size": 20, "samples": 60},
        refine={"epochs": epochs},
    )


def run(made: Recipe, out: Path, phase_1_of: Path | None = None) -> Any:
    console, started = Console(quiet=True), perf_counter()
    return train(made, out, Team.world(), console, Control(), started, phase_1_of=phase_1_of)


def test_a_phase_1_without_figures_of_the_validation_split_is_evaluated(tmp_path: Path) -> None:
    """As one of an earlier version, which evaluated the test split alone."""
    found = run(recipe(0), tmp_path / "one")
    file = tmp_path / "one" / "metrics" / "world.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.startswith("validation")} for line in lines]
    assert kept != lines
    file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    adopted = run(recipe(1), tmp_path / "other", tmp_path / "one")
    for name in ("validation_accuracy", "test_accuracy", "validation_loss", "test_loss"):
        assert adopted[name]["large_batch"] == found[name]["large_batch"]
