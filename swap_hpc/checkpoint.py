"""Files that are either whole or not there: models and results of a run."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from swap_hpc.errors import RunError, UserError
from swap_hpc.ranks import Team


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)`, then the file gets its name: a reader finds the old file or the new one, never a part.

    Raises RunError where the file cannot be written (a full disk, a read-only folder); what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _flush(temporary)
        temporary.rename(path)
        with contextlib.suppress(OSError):  # some network file systems cannot flush a folder; the file is whole there all the same
            _flush(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _once(team: Team, path: Path, write: Callable[[Path], object]) -> None:
    """`write_whole` by the team's first rank; where it raises, all ranks raise."""
    team.agree((lambda: write_whole(path, write)) if team.rank == 0 else lambda: None)


def write_text(path: Path, text: str, team: Team) -> None:
    _once(team, path, lambda temporary: temporary.write_text(text))


def write_json(path: Path, value: Mapping[str, Any], team: Team) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n", team)


def save_model(model: nn.Module, path: Path, team: Team) -> None:
    """Writes the state dict of `model`, alike on all ranks of `team`, as safetensors, once. Raises RunError on all of them."""

    def write(temporary: Path) -> None:
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
        save_file(tensors, temporary, metadata={"format": "pt"})

    _once(team, path, write)


def load_weights_(model: nn.Module, path: Path) -> None:
    """Gives `model` the weights in a .safetensors file. Raises UserError where they do not fit."""
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the weights {path}: {getattr(error, 'strerror', None) or error}") from None
    except RuntimeError as error:
        raise UserError(f"the weights {path} are not of this model: {' '.join(str(error).split())[:300]}") from None
