"""Saves to continue from: written whole, verified when read, the newest two of each part of the run kept."""

import contextlib
import json
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from swap_hpc.average.sharing import broadcast_tensors
from swap_hpc.average.state import is_extra
from swap_hpc.average.uniform import WeightSum
from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import from_bytes, real, tensor_bytes
from swap_hpc.recipe.loading import differing_fields, recipe_of
from swap_hpc.recipe.schema import Recipe
from swap_hpc.run.weights import Tensors, Unreadable, read_tensors, write_tensors
from swap_hpc.train.events import Running, SavePoint

FORMAT = "2"  # of the files; what another version wrote is refused


KEPT = 2  # files of each part


Position: TypeAlias = tuple[int, int]  # whole epochs done, and steps of the next one


@dataclass(frozen=True)
class Saved:
    point: SavePoint
    notes: dict[str, Any]  # what else was saved with it, as JSON can hold it


class Checkpoints:
    """The folder of a run's checkpoints: a file for all ranks in phase 1, one per group, by its first rank, in phase 2.

    Each is a .safetensors file: reading it executes nothing. Its header holds the format, the recipe, the position and a
    checksum of the whole; its tensors are the weights, buffers (every rank's, where they differ), momentum and sums of the
    cycles' weights.
    """

    def __init__(self, folder: Path, recipe: Recipe, data: str | None = None):
        """`data`: the data's identity as JSON, which stands in every file."""
        self.folder, self.recipe, self.data = folder, recipe, data

    def save(self, point: SavePoint, notes: Mapping[str, Any], team: Team) -> None:
        """Writes `point`, collectively over the part's team, then removes all but the part's newest two files.

        Raises RunError, on all ranks, where it cannot be written; the files before it stay.
        """
        packed = _packed(point.buffers)
        longest = int(team.maximum(len(packed))[0])  # extra states need not be of one length
        rows = team.gather(np.pad(packed, (0, longest - len(packed))))
        running = team.allgather(astuple(point.running))
        team.first(lambda: self._write(point, rows, {"running": running, "notes": notes}))

    def _write(self, point: SavePoint, rows: np.ndarray | None, state: dict[str, Any]) -> None:
        tensors = _prefixed(
            weights=point.weights,
            buffers=point.buffers,
            momentum=point.momentum,
            sums=point.cycles.sums,
            kept=point.cycles.kept,
        )
        if rows is not None and (rows != rows[0]).any():
            tensors["ranks"] = torch.from_numpy(rows)
        position = {
            name: getattr(point, name) for name in ("phase", "group", "epoch", "step", "ended")
        }
        state = {**state, **position, "cycles": point.cycles.count, "means": point.means}
        header = {"checkpoint": FORMAT, "recipe": self.recipe.to_toml(), "state": json.dumps(state)}
        if self.data:
            header["data"] = self.data
        write_tensors(
            self.folder / f"{point.name}-{point.epoch:05d}-{point.step:07d}.safetensors",
            tensors,
            header,
        )
        for old in self._files(point.name)[KEPT:]:
            old.unlink()

    def common(self, parts: Sequence[str], world: Team) -> Position | None:
        """The newest position at which all parts, of which each rank names its own, have a save that can be used; None where there is none.

        Collective over `world`. Raises as `load` does.
        """
        mine = world.agree(
            lambda: [{_position(state) for _, state in self._usable(part)} for part in parts]
        )
        shared = set.intersection(
            *(positions for each in world.allgather(mine) for positions in each)
        )
        return max(shared, default=None)

    def forget_after(self, at: Position, part: str, team: Team) -> None:
        """Removes the saves of a part behind a position, to which the run goes back: the newest two are then of its new way."""

        def remove() -> None:
            for path in self._files(part):
                if (
                    tuple(int(number) for number in path.stem.removeprefix(f"{part}-").split("-"))
                    > at
                ):
                    path.unlink()

        team.first(remove)

    def load(self, part: str, team: Team, at: Position | None = None) -> Saved | None:
        """The newest save of a part that can be used, as each rank of `team` goes on from it; None where there is none.

        `at`: the one at this position.

        A team of another size than the saving one shares the sums of the epoch so far, the mean of the ranks' running
        statistics, and the first rank's other buffers.
        Raises, on all ranks: RunError where files are there but none can be read; UserError for another recipe or format.
        """
        found = team.first(
            lambda: next(
                (each for each in self._usable(part) if at in (None, _position(each[1]))), None
            )
        )
        tensors, state = found or ({}, None)
        state, kinds = team.broadcast(
            (state, {name: (t.dtype, t.shape) for name, t in tensors.items()})
        )
        if state is None:
            return None
        for name, (dtype, shape) in kinds.items():
            (tensors[name],) = broadcast_tensors(
                [tensors.get(name, torch.empty(shape, dtype=dtype))], team
            )
        buffers = _of(tensors, "buffers")
        if "ranks" in tensors:
            rows = [_unpacked(row, buffers) for row in tensors["ranks"]]
            buffers = rows[team.rank] if len(rows) == team.size else _mean(rows, state["means"])
        point = SavePoint(
            **{name: state[name] for name in ("phase", "group", "epoch", "step", "ended")},
            due=False,
            weights=_of(tensors, "weights"),
            buffers=buffers,
            momentum=_of(tensors, "momentum"),
            cycles=sum_of(tensors, state["cycles"]),
            running=_share([Running(*each) for each in state["running"]], team),
            means=tuple(state["means"]),
        )
        return Saved(point, state["notes"])

    def _usable(self, part: str) -> Iterator[tuple[Tensors, dict[str, Any]]]:
        """Newest first. Raises where there are files, but none that can be used."""
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
                print(
                    f"swap-hpc: warning: {damaged} is {reason}; going on from {path.name}",
                    file=sys.stderr,
                    flush=True,
                )
                with contextlib.suppress(OSError):
                    damaged.rename(damaged.with_suffix(".damaged"))
            bad, found = {}, True
            yield tensors, json.loads(header["state"])
        if bad and not found:
            reasons = "; ".join(f"{path.name} is {why}" for path, why in bad.items())
            raise RunError(
                f"no checkpoint of {part} in {self.folder} can be used ({reasons}): restore one, or remove both to begin this part again"
            )

    def _check(self, path: Path, header: Mapping[str, str]) -> None:
        if header.get("checkpoint") != FORMAT:
            raise UserError(
                f"{path} has checkpoint format {header.get('checkpoint')}, this version reads {FORMAT}: "
                "finish the run with the version that began it, or choose another --out"
            )
        differing = differing_fields(self.recipe, recipe_of(header["recipe"], str(path)))
        if differing:
            raise UserError(
                f"{path} was saved by another recipe ({', '.join(differing)} differ): choose another --out, or remove the file"
            )

    def _files(self, part: str) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob(f"{part}-?????-???????.safetensors"), reverse=True)

    def holds(self, part: str) -> bool:
        """Whether there is a file of a part."""
        return bool(self._files(part))

    def remove(self, team: Team) -> None:
        """Removes the folder: the run is complete."""
        team.first(lambda: shutil.rmtree(self.folder, ignore_errors=True))


def _position(state: Mapping[str, Any]) -> Position:
    return state["epoch"], state["step"]


def sum_of(tensors: Tensors, count: int) -> WeightSum:
    """The sum of weights in the tensors of a checkpoint, or of a group's cycles."""
    return WeightSum(count, _of(tensors, "sums"), _of(tensors, "kept"))


def model_state(tensors: Tensors, header: Mapping[str, str]) -> Tensors:
    """The state dict in a checkpoint; of running statistics that differ between ranks the mean."""
    buffers = _of(tensors, "buffers")
    if "ranks" in tensors:
        buffers = _mean(
            [_unpacked(row, buffers) for row in tensors["ranks"]],
            json.loads(header["state"])["means"],
        )
    return _of(tensors, "weights") | buffers


def _prefixed(**parts: Mapping[str, Tensor]) -> Tensors:
    return {
        f"{part}/{name}": tensor
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def _of(tensors: Tensors, part: str) -> Tensors:
    return {
        name.removeprefix(f"{part}/"): t
        for name, t in tensors.items()
        if name.startswith(f"{part}/")
    }


def _packed(buffers: Tensors) -> np.ndarray:
    """All buffers' bytes, in the order of their names, (n,) uint8; before those of an extra state their number."""
    parts: list[np.ndarray] = [np.empty(0, np.uint8)]
    for name, tensor in sorted(buffers.items()):
        bytes_of = tensor_bytes(tensor)
        if is_extra(name):
            parts.append(np.array([len(bytes_of)], np.int64).view(np.uint8))
        parts.append(bytes_of)
    return np.concatenate(parts)


def _unpacked(row: Tensor, like: Tensors) -> Tensors:
    found: Tensors = {}
    start = 0
    for name, tensor in sorted(like.items()):
        size = tensor.numel() * tensor.element_size()
        if is_extra(name):
            size = int(row[start : start + 8].clone().view(torch.int64))
            start += 8
        part = row[start : start + size]
        found[name] = (
            part.clone() if is_extra(name) else from_bytes(part, tensor.dtype, tensor.shape)
        )
        start += size
    return found


def _mean(rows: list[Tensors], means: Collection[str]) -> Tensors:
    """The mean over the ranks, rounded once, of the buffers named in `means`; the others are the first rank's."""
    mean = {name: real(torch.stack([row[name] for row in rows])).double().mean(0) for name in means}
    return {name: _as(mean[name], t) if name in means else t for name, t in rows[0].items()}


def _as(values: Tensor, like: Tensor) -> Tensor:
    """Real numbers, (..., 2) of complex ones, rounded to a tensor's type."""
    return (torch.view_as_complex(values) if like.is_complex() else values).to(like.dtype)


def _share(running: list[Running], team: Team) -> Running:
    """A rank's own sums; where the ranks are others now, all of them on the first rank."""
    if len(running) == team.size:
        return running[team.rank]
    if team.rank > 0:
        return Running()
    loss, correct, samples, seconds = zip(*(astuple(each) for each in running), strict=True)
    return Running(sum(loss), sum(correct), sum(samples), max(seconds))
