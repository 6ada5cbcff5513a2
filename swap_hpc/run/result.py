"""What `result.json` holds, from the lines of a run's metrics and its times."""

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

from swap_hpc.data.sampling import EVALUATION
from swap_hpc.parallel.devices import Memory
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1, Part, Phase
from swap_hpc.recipe.schema import Recipe
from swap_hpc.run.journal import Line


def result_of(
    recipe: Recipe,
    lines: Mapping[Part, list[Line]],
    seconds: Mapping[str, float],
    memory: Memory,
    ranks: tuple[int, int | None],
    digest: str,
    world: Team,
) -> dict[str, Any]:
    """Alike on all ranks of `world`; the keys are those of the design.

    `lines`: of the parts that this rank tells of, "world" and its groups'. `seconds`: the slowest rank's, by name.
    `memory`: this rank's peak. `ranks`: their number in phase 1, and in phase 2 (None: by a job for each group, or by jobs on
    other numbers of ranks). `digest`: of the final weights.
    """
    first = [line for line in lines[PHASE_1] if line["phase"] == Phase.LARGE_BATCH]
    finals = {line["model"]: line for line in lines[PHASE_1] if line["phase"] == EVALUATION}
    ends, images = _over_groups(world.allgather(_ends_and_images(lines)))
    trained = {"large_batch": sum(line["images"] for line in first), "refine": images}
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "ranks": ranks[0],
        "refine_ranks": ranks[1] if recipe.refine.epochs else None,
        "groups": recipe.groups,
        "cycles": recipe.refine.cycles,
        "epochs": {
            "large_batch": len(first),
            "refine": recipe.refine.epochs * recipe.refine.cycles,
        },
        "train_accuracy": {"large_batch": first[-1]["train_accuracy"] if first else None},
        "test_accuracy": _figures("test_accuracy", finals, ends),
        "test_loss": _figures("test_loss", finals, ends),
        "seconds": dict(seconds),
        "images_per_second": {
            phase: count / seconds[phase] if seconds[phase] else None
            for phase, count in trained.items()
        },
        "peak_memory_mib": peak_memory(lines, memory, world),
        "weights_sha256": digest,
    }


def peak_memory(
    lines: Mapping[Part, list[Line]], memory: Memory, world: Team
) -> dict[str, float | None]:
    """The largest rank's, of this start of the run and of those before."""
    names = ("peak_memory_mib", "peak_gpu_allocated_mib", "peak_gpu_reserved_mib")
    before = [
        max((line.get(name) or 0.0 for part in lines.values() for line in part), default=0.0)
        for name in names
    ]
    now = [size / 2**20 for size in astuple(memory)]
    host, allocated, reserved = world.maximum(*map(max, before, now))
    return {"host": host, "gpu_allocated": allocated or None, "gpu_reserved": reserved or None}


_Ends = dict[tuple[int, int], Line]  # (group, cycle) -> the line of the cycle's last epoch


def _ends_and_images(lines: Mapping[Part, list[Line]]) -> tuple[_Ends, dict[int, int]]:
    """Of this rank's groups: the ends of their cycles, and the images that each was trained on."""
    epochs = [line for part in lines.values() for line in part if line["phase"] == Phase.REFINE]
    images: dict[int, int] = {}
    for line in epochs:
        images[line["group"]] = images.get(line["group"], 0) + line["images"]
    return {(line["group"], line["cycle"]): line for line in epochs}, images


def _over_groups(parts: list[tuple[_Ends, dict[int, int]]]) -> tuple[list[Line], int]:
    """The same of all ranks, of which several may tell of one group: the ends in order, and all images."""
    ends = {key: line for part, _ in parts for key, line in part.items()}
    images = {group: count for _, part in parts for group, count in part.items()}
    return [ends[key] for key in sorted(ends)], sum(images.values())


def _figures(name: str, finals: dict[str, Line], ends: list[Line]) -> dict[str, Any]:
    values = [line[name] for line in ends]
    return {
        "large_batch": finals["large_batch"][name],
        "groups": values,
        "mean_of_groups": sum(values) / len(values) if values else None,
        "averaged": finals["swap"][name] if "swap" in finals else None,
    }
