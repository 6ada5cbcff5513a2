"""What `result.json` holds, made from the metrics of a run and its times."""

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

from swap_hpc.data.sampling import EVALUATION
from swap_hpc.parallel.devices import Memory
from swap_hpc.parallel.grid import Ranks, of_groups
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1, Part, Phase
from swap_hpc.recipe.schema import Recipe
from swap_hpc.run.folder import ema_figures
from swap_hpc.run.lines import Line


def result_of(
    recipe: Recipe,
    lines: Mapping[Part, list[Line]],
    seconds: Mapping[str, float],
    memory: Memory,
    numbers: tuple[int, int | None],
    digest: str,
    ranks: Ranks,
) -> dict[str, Any]:
    """Return the content of `result.json` on the first rank; empty on others. Collective.

    Args:
        recipe: the run's.
        lines: the metrics of phase 1 and of this rank's groups.
        seconds: of the slowest rank, by phase.
        memory: the peak of this rank.
        numbers: the number of ranks in phase 1, and in phase 2; None where a job refined each
            group, or where jobs on other numbers of ranks did.
        digest: the hash of the final weights.
        ranks: whose lines and memory count.
    """
    peak = peak_memory(lines, memory, ranks.world)
    parts = of_groups(_ends_and_images(lines), ranks)
    if parts is None:
        return {}
    first = [line for line in lines[PHASE_1] if line["phase"] == Phase.LARGE_BATCH]
    finals = {line["model"]: line for line in lines[PHASE_1] if line["phase"] == EVALUATION}
    ends, images = _over_groups(parts)
    trained = {"large_batch": sum(line["images"] for line in first), "refine": images}
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "ranks": numbers[0],
        "refine_ranks": numbers[1] if recipe.refine.epochs else None,
        "groups": recipe.groups,
        "cycles": recipe.refine.cycles,
        "epochs": {
            "large_batch": len(first),
            "refine": recipe.refine.epochs * recipe.refine.cycles,
        },
        **{
            f"train_{name}": {"large_batch": first[-1][f"train_{name}"] if first else None}
            for name in recipe.metric_names
        },
        **{
            f"{split}_{name}": _figures(f"{split}_{name}", finals, ends)
            | ema_figures(f"{split}_{name}", first[-1] if first else {}, ends)
            for split in splits_in(finals["large_batch"])
            for name in (*recipe.metric_names, "loss")
        },
        "seconds": dict(seconds),
        "images_per_second": {
            phase: count / seconds[phase] if seconds[phase] else None
            for phase, count in trained.items()
        },
        "peak_memory_mib": peak,
        "weights_sha256": digest,
    }


def splits_in(line: Line) -> list[str]:
    """Return the splits besides training that a line has an evaluation of."""
    return [split for split in ("validation", "test") if f"{split}_loss" in line]


def peak_memory(
    lines: Mapping[Part, list[Line]], memory: Memory, world: Team
) -> dict[str, float | None]:
    """Return the peak of the largest rank, in this start of the run and in those before it."""
    names = ("peak_memory_mib", "peak_gpu_allocated_mib", "peak_gpu_reserved_mib")
    before = [
        max((line.get(name) or 0.0 for part in lines.values() for line in part), default=0.0)
        for name in names
    ]
    now = [size / 2**20 for size in astuple(memory)]
    host, allocated, reserved = world.maximum(*map(max, before, now))
    return {"host": host, "gpu_allocated": allocated or None, "gpu_reserved": reserved or None}


# (group, cycle) -> the line of the last epoch of the cycle
_Ends = dict[tuple[int, int], Line]


def _ends_and_images(lines: Mapping[Part, list[Line]]) -> tuple[_Ends, dict[int, int]]:
    """Return the ends of the cycles of this rank's groups, and the images trained on per group."""
    epochs = [line for part in lines.values() for line in part if line["phase"] == Phase.REFINE]
    images: dict[int, int] = {}
    for line in epochs:
        images[line["group"]] = images.get(line["group"], 0) + line["images"]
    return {(line["group"], line["cycle"]): line for line in epochs}, images


def _over_groups(parts: list[tuple[_Ends, dict[int, int]]]) -> tuple[list[Line], int]:
    """Merge what the groups' first ranks found: the ends in order, and the number of all images."""
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
