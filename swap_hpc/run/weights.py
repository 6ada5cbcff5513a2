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
    """A file of tensors cannot be used; the message is the reason."""


def save_model(model: nn.Module, path: Path, header: Mapping[str, str], team: Team) -> None:
    """Write the state dict of a model that all ranks of a team hold, once.

    Args:
        model: the same on all ranks of `team`.
        path: the file; missing parent folders are made.
        header: see `Job.header`.
        team: its first rank writes.

    Raises:
        RunError: on all ranks of `team`, the file cannot be written.
    """
    team.first(lambda: write_tensors(path, state_of(model), header))


def save_sum(total: WeightSum, path: Path, header: Mapping[str, str], team: Team) -> None:
    """Write a sum of weights that all ranks of a team hold, once; see `save_model`."""
    sums = {f"sums/{name}": tensor for name, tensor in total.sums.items()}
    kept = {f"kept/{name}": tensor for name, tensor in total.kept.items()}
    counted = {**header, "count": str(total.count)}
    team.first(lambda: write_tensors(path, sums | kept, counted))


def save_ema(point: SavePoint, path: Path, header: Mapping[str, str], team: Team) -> None:
    """Write the moving average of a model as it is at a save point, once; see `save_model`."""
    team.first(lambda: write_tensors(path, point.ema_state, header))


def save_snapshot(point: SavePoint, folder: Path, header: Mapping[str, str], team: Team) -> None:
    """Write the model as it is at an epoch's end, once; see `save_model`.

    The file's name holds the part of the run and the epoch.
    """
    path = folder / f"{point.part.name}-{point.at.epoch:05d}.safetensors"
    team.first(lambda: write_tensors(path, point.weights | point.buffers, header))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a .safetensors file that holds its own checksum.

    Raises:
        RunError: it cannot be written.
    """
    # safetensors refuses tensors that share memory, as tied weights do: each becomes a copy.
    copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    complete = {**header, "format": "pt"}
    complete["sha256"] = _checksum(copies, complete)
    write_whole(path, lambda temporary: _save(copies, temporary, complete))


def _save(tensors: Tensors, path: Path, header: dict[str, str]) -> None:
    """Save a file; raise OSError where safetensors raises its own error for one of the system."""
    try:
        save_file(tensors, path, metadata=header)
    except SafetensorError as error:
        wrapping = r"^Error while serializing: (I/O error: )?| \(os error \d+\)$"
        raise OSError(re.sub(wrapping, "", str(error))) from None


def read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Read the tensors and the header of a .safetensors file; nothing in it is executed.

    Returns:
        The tensors by name, and the header as `own_header` has it.

    Raises:
        Unreadable: the file is damaged or does not exist.
        RunError: the system cannot read it now.
    """
    check_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = own_header(file.metadata())
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or _kind_of_other_file(path)
        raise Unreadable(reason or f"truncated or damaged: {error}") from None
    if header and header["sha256"] != _checksum(tensors, header):
        raise Unreadable("damaged: its checksum does not match")
    return tensors, header


def check_readable(path: Path) -> None:
    """Check that a path is that of a file that can be opened.

    Raises:
        Unreadable: it is a folder, or there is nothing.
        RunError: the system cannot open it now.
    """
    if path.is_dir():
        raise Unreadable("a folder: name a .safetensors file in it")
    if not path.is_file():
        raise Unreadable("No such file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None


def is_safetensors(start: bytes) -> bool:
    """Tell whether a file begins as .safetensors files do: the length of its header, and that."""
    return start[8:9] == b"{"


def _kind_of_other_file(path: Path) -> str | None:
    """Return what a file is whose first bytes are not those of a .safetensors file, else None."""
    with path.open("rb") as file:
        start = file.read(80)
    if not start:
        return "an empty file"
    if is_safetensors(start):
        return None
    if start.startswith((b"PK\x03\x04", b"\x80")):  # today's format of torch.save, and its old one
        return "a file of torch.save, where a .safetensors file is needed"
    first_line = re.match(rb"[\t -~]+(?=\r?\n|$)", start)
    if first_line:
        return f"a text file, no weights: it begins with {first_line[0].decode()!r}"
    return "no file of weights, neither .safetensors nor of torch.save"


def own_header(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return the metadata of a .safetensors file that this program wrote; empty for any other.

    Another program may use single words of ours, such as "data" or "checkpoint", for something
    else. So a file is ours where both the recipe and the checksum are there, which we always write.
    """
    found = dict(metadata or {})
    return found if {"recipe", "sha256"} <= found.keys() else {}


def is_checkpoint(header: Mapping[str, str]) -> bool:
    """Tell whether the header of a file of ours is that of a save to resume from."""
    return {"checkpoint", "state"} <= header.keys()


def read_header(path: Path) -> dict[str, str]:
    """Return the header of a .safetensors file of ours, its checksum not compared.

    It is empty where the file cannot be read, or is another program's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return own_header(file.metadata())
    except (OSError, SafetensorError):
        return {}


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Return the SHA-256 of all that a file holds, except for the checksum itself."""
    rest = {key: value for key, value in header.items() if key != "sha256"}
    digest = hashed(tensors)
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()


def load_weights_(model: nn.Module, path: Path) -> None:
    """Load the weights in a .safetensors file into a model.

    Raises:
        UserError: the file cannot be used, or its weights do not fit.
    """
    try:
        tensors, _ = read_tensors(path)
    except Unreadable as why:
        raise UserError(f"cannot read the weights {path}: {why}") from None
    fill_(model, tensors, str(path))


def prefixed(**parts: Mapping[str, Tensor]) -> Tensors:
    """Return tensors of several parts under one name each, PART/NAME, as a file holds them."""
    return {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}


def without_prefix(tensors: Tensors, part: str) -> Tensors:
    """Return the tensors of one part, as they were before `prefixed`."""
    prefix = f"{part}/"
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
