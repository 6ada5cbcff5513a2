"""One run: builds everything from a recipe, consumes the events of `swap()`, fills the run's folder."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from torch import nn

from swap_hpc import models
from swap_hpc.averaging import check_equal
from swap_hpc.checkpoint import load_weights_, save_model, write_json, write_text
from swap_hpc.data import Arrays, Dataset, load
from swap_hpc.devices import choose_device
from swap_hpc.doctor import environment
from swap_hpc.errors import UserError
from swap_hpc.fit import Epoch, Evaluation, Job, evaluate_job
from swap_hpc.gradients import check_horovod
from swap_hpc.metrics import Display, Journal, Stopwatch
from swap_hpc.ranks import Ranks, Team, grid, node_of
from swap_hpc.recipe import Recipe, differing_fields, load_recipe
from swap_hpc.swap import swap


def train(recipe: Recipe, out: Path, world: Team, console: Console, started: float) -> dict[str, Any]:
    """Runs `recipe` on the ranks of `world` into the folder `out`, and returns what `result.json` holds.

    `recipe` has passed `check_ranks`. A folder whose run is complete is left as it is. `started`: `perf_counter()` when the process began.
    Raises UserError, before any training, for all that is wrong with the input; RunError where the run fails.
    """
    finished = world.broadcast(world.agree(lambda: _finished(recipe, out)))
    with node_of(world) as node, grid(world, recipe.groups) as ranks:
        display = Display(recipe, ranks, console)
        if finished:
            display.say(f"{out} holds this run, complete: nothing to do")
            return finished
        job, model = _set_up(recipe, world, node)
        write_text(out / "recipe.toml", recipe.to_toml(), world)
        write_json(out / "environment.json", environment(world, job.device) | {"command": [Path(sys.argv[0]).name, *sys.argv[1:]]}, world)
        for line in _introduction(job, ranks, out):
            display.say(line)
        with display.running():
            result = _Consumer(job, ranks, out, display, started).consume(model)
        write_json(out / "result.json", result, world)
    return result


def _finished(recipe: Recipe, out: Path) -> dict[str, Any] | None:
    """What `result.json` in `out` holds, None where there is none. Raises UserError where `out` holds another recipe's run."""
    if not (out.is_dir() or not out.exists()):
        raise UserError(f"--out {out} is a file: name a folder")
    if (out / "recipe.toml").is_file():
        differing = differing_fields(recipe, load_recipe(str(out / "recipe.toml")))
        if differing:
            raise UserError(
                f"{out} holds a run of another recipe ({', '.join(differing)} differ): choose another --out, or remove the folder"
            )
    try:
        return json.loads((out / "result.json").read_text())
    except FileNotFoundError:
        return None


def _set_up(recipe: Recipe, world: Team, node: Team) -> tuple[Job, nn.Module]:
    """All that can fail before training: the device, the data, the model."""
    device = world.agree(lambda: choose_device(node, recipe.device))
    kinds = world.allgather(device.torch.type)
    if len(set(kinds)) > 1:
        raise UserError(f"rank {kinds.index('cpu')} sees no GPU, others do: ask the launcher for a GPU per rank, or --set device=cpu")
    if world.size > 1:
        world.agree(lambda: check_horovod(device))
    torch.set_num_threads(device.threads)
    if device.torch.type == "cuda":
        torch.cuda.set_device(device.torch)
    dataset = load(recipe.data, world, device.threads)
    world.agree(lambda: _check_sizes(recipe, dataset))
    model = world.agree(lambda: _model(recipe, dataset))
    return Job(recipe, dataset, device), model.to(device.torch)


def _model(recipe: Recipe, dataset: Dataset) -> nn.Module:
    model = models.build(recipe.model, len(dataset.classes), dataset.channels, recipe.seed)
    if recipe.model.weights:
        load_weights_(model, recipe.model.weights)
    return model


def _check_sizes(recipe: Recipe, dataset: Dataset) -> None:
    samples = len(dataset.train)
    used = {"large_batch.batch_size": recipe.large_batch.batch_size if recipe.large_batch.epochs else 0}
    if recipe.refine.epochs:
        used["refine.batch_size"] = recipe.refine.batch_size
        used["batchnorm.batch_size"] = recipe.batchnorm.batch_size
        used["batchnorm.samples"] = recipe.batchnorm.samples or 0
    for name, wanted in used.items():
        if wanted > samples:
            raise UserError(f"{name} = {wanted}, but there are {samples} training samples: --set {name}={samples} or less")
    if recipe.batchnorm.samples and recipe.batchnorm.samples < recipe.batchnorm.batch_size:
        raise UserError(
            f"batchnorm.samples = {recipe.batchnorm.samples} is less than one batch: "
            f"--set batchnorm.samples={recipe.batchnorm.batch_size} or more"
        )
    smallest, pad = min(dataset.image_size), recipe.augment.pad
    if pad >= smallest or recipe.augment.cutout > smallest:
        raise UserError(
            f"augment.pad = {pad} and augment.cutout = {recipe.augment.cutout} do not fit images of {smallest} pixels: make them smaller"
        )


def _introduction(job: Job, ranks: Ranks, out: Path) -> list[str]:
    recipe, device = job.recipe, job.device
    where = "in memory" if isinstance(job.dataset.train, Arrays) else "read and decoded in every epoch"
    lines = [
        f"{recipe.name}: {ranks.world.size} ranks, {recipe.groups} groups, {device.name}, {device.threads} threads per rank, "
        f"{recipe.precision}; {len(job.dataset.train):,} training and {len(job.dataset.test):,} test images, {where}; into {out}"
    ]
    if device.is_shared(ranks.world):
        lines.append("ranks share a GPU: gradients go through host memory")
    return lines


@dataclass
class _Consumer:
    """What `swap()` yields, turned into files, lines on the screen, and the numbers of `result.json`."""

    job: Job
    ranks: Ranks
    out: Path
    display: Display
    started: float
    epochs: dict[int | None, Epoch] = field(default_factory=dict)  # the last one of phase 1 (None) and of each group of this rank
    cycles: dict[tuple[int, int], Evaluation] = field(default_factory=dict)  # (group, cycle) -> test, at each cycle's end
    images: dict[str, int] = field(default_factory=lambda: {"large_batch": 0, "refine": 0})
    large_batch: Evaluation | None = None
    averaged: Evaluation | None = None

    def consume(self, model: nn.Module) -> dict[str, Any]:
        journal = Journal(self.out / "metrics", self.ranks)
        watch = Stopwatch()
        watch.seconds["setup"] = perf_counter() - self.started
        for event in swap(model, self.job, self.ranks):
            if isinstance(event, Epoch):
                journal.epoch(event)
                self._epoch(event, watch)
            else:
                self._done(event.what, event.model, journal, watch)
        return self._result(model, watch)

    def _epoch(self, epoch: Epoch, watch: Stopwatch) -> None:
        self.display.epoch(epoch)
        self.epochs[epoch.group] = epoch
        self.images[epoch.phase] += epoch.images
        watch.seconds[epoch.phase] += epoch.train_seconds
        watch.seconds["evaluate"] += epoch.evaluate_seconds
        if epoch.ends_cycle and epoch.test and epoch.group is not None:
            self.cycles[epoch.group, epoch.cycle] = epoch.test
        elif epoch.ends_cycle:
            self.large_batch = epoch.test

    def _done(self, what: str, model: nn.Module, journal: Journal, watch: Stopwatch) -> None:
        world = self.ranks.world
        if what == "large_batch":
            if self.large_batch is None:  # no epoch of this phase: the model came from a file
                watch.lap()
                self.large_batch = evaluate_job(model, self.job, world)
                watch.lap("evaluate")
            journal.evaluation("large_batch", self.large_batch)
            save_model(model, self.out / "large_batch.safetensors", world)
        elif what.startswith("group-"):
            save_model(model, self.out / f"{what}.safetensors", self.ranks.group)
        elif what == "refine":
            world.barrier()  # waiting for the slowest group is part of neither phase
            watch.lap()
        elif what == "average":
            watch.lap("average")
        elif what == "batchnorm":
            watch.lap("batchnorm")
            self.averaged = evaluate_job(model, self.job, world)
            watch.lap("evaluate")
            journal.evaluation("swap", self.averaged)
            save_model(model, self.out / "swap.safetensors", world)

    def _result(self, model: nn.Module, watch: Stopwatch) -> dict[str, Any]:
        recipe, world = self.job.recipe, self.ranks.world
        watch.seconds["total"] = perf_counter() - self.started
        names = ("setup", "large_batch", "refine", "average", "batchnorm", "evaluate", "total")
        seconds = dict(zip(names, world.maximum(*(watch.seconds[name] for name in names)), strict=True))
        cycles = {key: test for part in world.allgather(self.cycles) for key, test in part.items()}
        groups = [cycles[key] for key in sorted(cycles)]
        first, last = self.epochs.get(None), next((e for group, e in self.epochs.items() if group is not None), None)
        # every rank of a group counts the group's images
        refined = world.sums(self.images["refine"])[0] / self.ranks.group.size
        per_second = {"large_batch": (self.images["large_batch"], seconds["large_batch"]), "refine": (refined, seconds["refine"])}
        return {
            "recipe": recipe.name,
            "seed": recipe.seed,
            "ranks": world.size,
            "groups": recipe.groups,
            "cycles": recipe.refine.cycles,
            "epochs": {"large_batch": first.epoch if first else 0, "refine": last.epoch if last else 0},
            "train_accuracy": {"large_batch": first.train.accuracy if first else None},
            "test_accuracy": _figures("accuracy", self.large_batch, groups, self.averaged),
            "test_loss": _figures("loss", self.large_batch, groups, self.averaged),
            "seconds": seconds,
            "images_per_second": {phase: images / time if time else None for phase, (images, time) in per_second.items()},
            "weights_sha256": check_equal(model, world),
        }


def _figures(name: str, large_batch: Evaluation | None, groups: list[Evaluation], averaged: Evaluation | None) -> dict[str, Any]:
    values = [getattr(group, name) for group in groups]
    return {
        "large_batch": getattr(large_batch, name),
        "groups": values,
        "mean_of_groups": sum(values) / len(values) if values else None,
        "averaged": getattr(averaged, name) if averaged else None,
    }
