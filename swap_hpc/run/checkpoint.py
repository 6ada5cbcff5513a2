"""Saves to resume from: written whole, verified when read, the newest two of each part kept."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from swap_hpc.average.sharing import broadcast_tensors
from swap_hpc.average.uniform import WeightSum
from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.atomic import ask_guards, remove
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.loading import check_same_recipe, recipe_of
from swap_hpc.recipe.phase import PHASE_1, Part, Phase, refinement_of
from swap_hpc.recipe.schema import Recipe
from swap_hpc.run.buffers import unpacked
from swap_hpc.run.own_files import CHECKPOINTS, own_files, remove_files
from swap_hpc.run.rank_state import (
    gathered_buffers,
    own_buffers,
    running_of_ranks,
    shared_buffers,
)
from swap_hpc.run.weights import (
    Tensors,
    Unreadable,
    prefixed,
    read_tensors,
    without_prefix,
    write_tensors,
)
from swap_hpc.train.events import Position, Running, SavePoint
from swap_hpc.train.state import flatten, unflatten

FORMAT = "3"  # of the files; others are refused
KEPT = 2  # files of each part
STEPS = 2**32  # more than an epoch has; positions are compared as numbers


@dataclass(frozen=True)
class Saved:
    """A save point, and what was saved beside it."""

    point: SavePoint
    notes: dict[str, Any]  # as JSON can hold it


class _Found(NamedTuple):
    """A file that is resumed from, as the first rank has read it."""

    tensors: Tensors
    state: dict[str, Any] | None
    own: dict[str, np.ndarray]
    """Of each rank, by the prefix of their names: see `own_buffers`."""
    running: list[Running] | None
    """Of each rank."""


class Checkpoints:
    """The folder of a run's checkpoints.

    In phase 1 all ranks save one file, in phase 2 each group saves one; the first rank writes it.
    It is a .safetensors file, so that reading it executes nothing. Its header holds the format, the
    recipe, the position and a checksum of the whole. Its tensors are:

    - `weights/NAME`: of the state dict, the same on all ranks
    - `buffers/NAME`: of the state dict, the first rank's, with extra states
    - `ranks`: the buffers of every rank as bytes, (ranks, n) uint8, where they differ
    - `training/PATH`: the state of the optimizer; the header holds its numbers (and in fp16 the
      loss scale) and its shape
    - `ema_weights/NAME`, `ema_buffers/NAME`, `ema_ranks`: the same of the moving average
    - `sums/NAME`: the sum of the weights at the ends of a group's cycles
    - `kept/NAME`: what is not averaged, as it was at the end of the first cycle

    The header's `state` is JSON: the position, whether the part has ended, the number of cycles in
    the sum, the names of the buffers whose mean counts, the ranks' running sums of the epoch, the
    plain values of the optimizer, and the notes that the caller saves.
    """

    def __init__(self, folder: Path, recipe: Recipe, data: str | None = None):
        """
        Args:
            folder: of the files; it need not exist.
            recipe: the run's; it is saved, and files of another recipe are refused.
            data: the identity of the data as JSON, which is saved too.
        """
        self.folder, self.recipe, self.data = folder, recipe, data

    def save(self, point: SavePoint, notes: Mapping[str, Any], team: Team) -> None:
        """Write a save point, then remove all but the newest two files of its part.

        Collective over the part's team.

        Raises:
            RunError: on all ranks, it cannot be written; the files before it stay.
            UserError: on all ranks, the optimizer keeps something that a file cannot hold.
        """
        rows = {
            "ranks": gathered_buffers(point.buffers, team),
            "ema_ranks": gathered_buffers(point.ema_buffers, team),
        }
        running = team.gathered(astuple(point.running))
        team.first(lambda: self._write(point, rows, {"running": running, "notes": notes}))

    def _write(
        self, point: SavePoint, rows: dict[str, np.ndarray | None], state: dict[str, Any]
    ) -> None:
        tensors = prefixed(
            weights=point.weights,
            buffers=point.buffers,
            sums=point.cycle_sum.sums,
            kept=point.cycle_sum.kept,
            ema_weights=point.ema_weights,
            ema_buffers=point.ema_buffers,
        )
        training, training_tensors = flatten(point.training, "training")
        tensors |= training_tensors
        for name, of_ranks in rows.items():
            if of_ranks is not None:
                tensors[name] = torch.from_numpy(of_ranks)
        state = {
            **state,
            "phase": point.part.phase.value,
            "group": point.part.group,
            "epoch": point.at.epoch,
            "step": point.at.step,
            "ended": point.ended,
            "cycles": point.cycle_sum.count,
            "means": point.means,
            "training": training,
        }
        header = {"checkpoint": FORMAT, "recipe": self.recipe.to_toml(), "state": json.dumps(state)}
        if self.data:
            header["data"] = self.data
        name = f"{point.part.name}-{point.at.epoch:05d}-{point.at.step:07d}.safetensors"
        write_tensors(self.folder / name, tensors, header)
        for old in self._files(point.part)[KEPT:]:
            remove(old)

    def common(self, parts: Sequence[Part], world: Team) -> Position | None:
        """Return the newest position at which all parts have a save that can be used.

        Collective over `world`.

        Args:
            parts: this rank's.
            world: the ranks whose parts count.

        Returns:
            The position, None where there is none.

        Raises:
            As `load` does.
        """

        def positions_of(part: Part) -> set[Position]:
            return {_position(state) for _, state in self._usable(part)}

        mine = world.agree(lambda: set.intersection(*map(positions_of, parts)))
        return newest_of_all(mine, world)

    def forget_after(self, at: Position, part: Part, team: Team) -> None:
        """Remove the saves of a part after a position, to which the run goes back.

        They would otherwise count as the newest files, before those that are saved from there on.
        """

        def remove_newer() -> None:
            for path in self._files(part):
                epoch, step = path.stem.removeprefix(f"{part.name}-").split("-")
                if Position(int(epoch), int(step)) > at:
                    remove(path)

        team.first(remove_newer)

    def load(self, part: Part, team: Team, at: Position | None = None) -> Saved | None:
        """Return the newest save of a part that can be used, as each rank resumes from it.

        Collective over `team`. A team of another size than the saving one shares the sums of the
        epoch so far, the mean of the ranks' running statistics, and the first rank's other buffers.

        Args:
            part: the part of the run.
            team: the ranks that resume it.
            at: the position of the save that is asked for; None is the newest.

        Returns:
            The save, None where there is none.

        Raises:
            RunError: on all ranks, there are files, but none can be read.
            UserError: on all ranks, a file is of another recipe or format.
        """

        def find() -> _Found | None:
            for tensors, state in self._usable(part):
                if at is None or at == _position(state):
                    # What each rank has of its own goes to that rank alone.
                    own = own_buffers(tensors, state["means"], team)
                    running = running_of_ranks(state.pop("running"), team)
                    return _Found(tensors, state, own, running)
            return None

        found = team.first(find)
        tensors, state, own, running = found or _Found({}, None, {}, None)
        kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        state, kinds, prefixes = team.broadcast((state, kinds, [*own]))
        if state is None:
            return None
        for name, (dtype, shape) in kinds.items():
            mine = tensors.get(name, torch.empty(shape, dtype=dtype))
            (tensors[name],) = broadcast_tensors([mine], team)
        for prefix in prefixes:
            row = torch.from_numpy(team.scatter(own.get(prefix)))
            buffers = unpacked(row, without_prefix(tensors, prefix))
            tensors |= prefixed(**{prefix: buffers})
        point = SavePoint(
            part=Part(Phase(state["phase"]), state["group"]),
            at=_position(state),
            ended=state["ended"],
            due=False,
            weights=without_prefix(tensors, "weights"),
            buffers=without_prefix(tensors, "buffers"),
            training=unflatten(state["training"], tensors),
            cycle_sum=sum_of(tensors, state["cycles"]),
            running=team.scattered(running),
            means=tuple(state["means"]),
            ema_weights=without_prefix(tensors, "ema_weights"),
            ema_buffers=without_prefix(tensors, "ema_buffers"),
        )
        return Saved(point, state["notes"])

    def _usable(self, part: Part) -> Iterator[tuple[Tensors, dict[str, Any]]]:
        """Yield the tensors and the state of each file of a part that can be used, newest first.

        Raises:
            RunError: there are files, but none can be used.
        """
        bad: dict[Path, Unreadable] = {}
        found = False
        for path in self._files(part):
            try:
                tensors, header = read_tensors(path)
                if "sha256" not in header:
                    raise Unreadable("damaged: it has no checksum")
            except Unreadable as why:
                bad[path] = why
                continue
            self._check(path, header)
            for damaged, reason in bad.items():
                warning = f"{damaged} is {reason}; going on from {path.name}"
                print(f"swap-hpc: warning: {warning}", file=sys.stderr, flush=True)
                ask_guards(damaged)
                with suppress(OSError):
                    damaged.rename(damaged.with_suffix(".damaged"))
            bad, found = {}, True
            yield tensors, json.loads(header["state"])
        if bad and not found:
            reasons = "; ".join(f"{path.name} is {why}" for path, why in bad.items())
            raise RunError(
                f"no checkpoint of {part.name} in {self.folder} can be used ({reasons}): "
                "restore one, or remove both to begin this part again"
            )

    def _check(self, path: Path, header: Mapping[str, str]) -> None:
        """Raise UserError for a file of another format or recipe."""
        version = header.get("checkpoint")
        if version != FORMAT:
            raise UserError(
                f"{path} has checkpoint format {version}, this version reads {FORMAT}: "
                "finish the run with the version that began it, or choose another --out"
            )
        other = recipe_of(header["recipe"], str(path))
        check_same_recipe(self.recipe, other, f"{path} was saved by", "the file")

    def _files(self, part: Part) -> list[Path]:
        """Return the files of a part, newest first."""
        return sorted(self.folder.glob(f"{part.name}-?????-???????.safetensors"), reverse=True)

    def holds(self, part: Part) -> bool:
        """Tell whether there is a file of a part."""
        return bool(self._files(part))

    def end(self, team: Team) -> None:
        """Remove what a complete run does not need, and the folder if nothing is left in it."""
        team.first(lambda: remove_files(self.surplus()))

    def surplus(self) -> list[Path]:
        """Return the files that a complete run does not need: all, or but each part's newest."""
        if not self.recipe.checkpoint.keep:
            return own_files(self.folder, CHECKPOINTS)
        groups = [refinement_of(group) for group in range(self.recipe.groups)]
        return [old for part in (PHASE_1, *groups) for old in self._files(part)[1:]]


def _position(state: Mapping[str, Any]) -> Position:
    return Position(state["epoch"], state["step"])


def sum_of(tensors: Tensors, count: int) -> WeightSum:
    """Return the sum of weights in the tensors of a checkpoint, or of a group's cycles."""
    return WeightSum(count, without_prefix(tensors, "sums"), without_prefix(tensors, "kept"))


def model_state(tensors: Tensors, header: Mapping[str, str]) -> Tensors:
    """Return the state dict in a checkpoint.

    Where running statistics differ between the ranks, it has their mean.
    """
    return without_prefix(tensors, "weights") | shared_buffers(
        tensors, json.loads(header["state"])["means"]
    )


def newest_of_all(mine: set[Position], world: Team) -> Position | None:
    """Return the newest position that all ranks have; None where there is none. Collective.

    Each round rules out what is newer than the newest position of the rank that is furthest behind.
    """
    numbers = {each.epoch * STEPS + each.step for each in mine}
    while True:
        newest = max(numbers, default=-1)
        highest, lowest = world.maximum(newest, -newest)
        if highest == -lowest:
            return None if newest < 0 else Position(*divmod(newest, STEPS))
        numbers = {each for each in numbers if each <= -lowest}
