"""Weights in .safetensors files, each of which holds its own checksum."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from swap_hpc.average.agreement import hashed
from swap_hpc.average.state import state_of
from swap_hpc.average.uniform import WeightSum
from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.atomic import write_whole
from swap_hpc.parallel.teams import Team
from swap_hpc.train.events import SavePoint
from swap_hpc.train.models import fill_

Tensors = dict[str, Tensor]


class Unreadable(Exception):
    """Why a file of tensors cannot be used."""


def save_model(model: nn.Module, path: Path, header: Mapping[str, str], team: Team) -> None:
    """Writes the state dict of `model`, alike on all ranks of `team`, once. `header`: see `Job.header`. Raises RunError on all."""
    team.first(lambda: write_tensors(path, state_of(model), header))


def save_sum(total: WeightSum, path: Path, header: Mapping[str, str], team: Team) -> None:
    """Writes a sum of weights, alike on all ranks of `team`, once. Raises RunError on all of them."""
    tensors = {f"sums/{name}": t for name, t in total.sums.items()} | {
        f"kept/{name}": t for name, t in total.kept.items()
    }
    team.first(lambda: write_tensors(path, tensors, {**header, "count": str(total.count)}))


def save_snapshot(point: SavePoint, folder: Path, header: Mapping[str, str], team: Team) -> None:
    """Writes the model as it is at an epoch's end, once, its part of the run and the epoch in the name. Raises RunError on all."""
    path = folder / f"{point.part.name}-{point.at.epoch:05d}.safetensors"
    team.first(lambda: write_tensors(path, point.weights | point.buffers, header))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """A .safetensors file that holds its own checksum. Raises RunError where it cannot be written."""
    copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    header = {**header, "format": "pt"}
    header["sha256"] = _checksum(copies, header)
    write_whole(path, lambda temporary: _save(copies, temporary, header))


def _save(tensors: Tensors, path: Path, header: dict[str, str]) -> None:
    """Raises OSError where safetensors raises an error of its own for what the system said."""
    try:
        save_file(tensors, path, metadata=header)
    except SafetensorError as error:
        said = re.sub(
            r"^Error while serializing: (I/O error: )?| \(os error \d+\)$", "", str(error)
        )
        raise OSError(said) from None


def read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors and header of a .safetensors file; nothing in it is executed. Raises Unreadable where it is damaged or not there,
    RunError where the system cannot read it now."""
    if path.is_dir():
        raise Unreadable("a folder: name a .safetensors file in it")
    if not path.is_file():
        raise Unreadable("No such file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    except (OSError, SafetensorError) as error:
        raise Unreadable(
            getattr(error, "strerror", None) or _what_else(path) or f"truncated or damaged: {error}"
        ) from None
    # a file that somebody else wrote has no checksum
    if "sha256" in header and header["sha256"] != _checksum(tensors, header):
        raise Unreadable("damaged: its checksum does not match")
    return tensors, header


def _what_else(path: Path) -> str | None:
    """What a file is that is no .safetensors file, if its first bytes tell."""
    with path.open("rb") as file:
        if file.read(4).startswith((b"PK\x03\x04", b"\x80")):  # a zip file, a pickle
            return (
                "a file of torch.save, whose loading can run code: where you trust it, write its state dict "
                "with safetensors.torch.save_file(torch.load(FILE), NEW)"
            )
    return None


def read_header(path: Path) -> dict[str, str]:
    """The header of a .safetensors file, not checked; empty where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 of all that a file says but for the checksum itself."""
    digest = hashed(tensors)
    digest.update(
        json.dumps({k: v for k, v in header.items() if k != "sha256"}, sort_keys=True).encode()
    )
    return digest.hexdigest()


def load_weights_(model: nn.Module, path: Path) -> None:
    """Gives `model` the weights in a .safetensors file. Raises UserError where they do not fit."""
    try:
        tensors, _ = read_tensors(path)
    except Unreadable as why:
        raise UserError(f"cannot read the weights {path}: {why}") from None
    fill_(model, tensors, str(path))
