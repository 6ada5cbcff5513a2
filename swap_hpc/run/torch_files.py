"""Files of `torch.save`, read without running anything that they name."""

import re
import warnings
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from swap_hpc.recipe.wording import first_few, shortened
from swap_hpc.run.weights import Unreadable

# How files of `torch.save` begin: a zip archive today, a pickle with a number of torch's before.
ZIP, PICKLE = b"PK\x03\x04", b"\x80"
_NUMBER = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

CHUNK = 2**20  # bytes that are read at a time

_TRUST = "if you trust the file, write its state dict alone: "
OF_CHECKPOINT = f"{_TRUST}torch.save(torch.load(FILE, weights_only=False)[...], NEW)"
OF_MODULE = f"{_TRUST}torch.save(torch.load(FILE, weights_only=False).state_dict(), NEW)"


class StandIn:
    """Stands for an object whose class a file names: the class is not imported, nor called."""

    name = ""  # of the class, with its module

    def __new__(cls, *_: Any, **__: Any) -> "StandIn":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Forget what the object held."""


def _empty(*_: Any) -> dict[Any, Any]:
    """Return what stands for a `defaultdict`, which torch fills afterwards."""
    return {}


def read_torch_file(path: Path) -> tuple[Any, list[str]]:
    """Return what a file of `torch.save` holds, its tensors on the CPU.

    A checkpoint often holds more than tensors and plain values: arguments, NumPy's numbers. A
    `StandIn` takes the place of each such object, so that nothing in the file can run.

    Args:
        path: a file that begins with `ZIP` or `PICKLE`.

    Returns:
        The content, and the sorted names of the classes and functions that were left out.

    Raises:
        Unreadable: the file is damaged, of another program, or of use only where its code runs.
    """
    with path.open("rb") as file:
        start = file.read(64)
    is_zip = start.startswith(ZIP)
    unknown: list[str] = []
    try:
        if is_zip:
            _check_archive(path)
            unknown = sorted(get_unsafe_globals_in_checkpoint(str(path)))
        elif start[2:14] != _NUMBER[:12]:
            raise Unreadable("a pickle, but not one of torch.save: reading it would run code")
        with safe_globals([_stand_in(name) for name in unknown]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that then fail, which is said below
            return _load(path, is_zip), unknown
    except Unreadable:
        raise
    except Exception as error:  # torch raises whatever a malformed file leads to
        raise Unreadable(_reason(error, unknown)) from None


def _check_archive(path: Path) -> None:
    """Raise Unreadable for a zip archive that `torch.save` has not written, or not wholly."""
    try:
        with ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except BadZipFile:
        raise Unreadable("truncated or damaged: a zip archive without its end") from None
    if "constants.pkl" in names:
        raise Unreadable(
            "a TorchScript archive, which is a program: write the state dict of the module alone, "
            "torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        )
    if "data.pkl" not in names:
        raise Unreadable("a zip archive, but not one of torch.save")
    _check_sums(path)


def _check_sums(path: Path) -> None:
    """Raise Unreadable where an entry of an archive does not match its checksum.

    torch compares none where it maps a file. The sums are all 0 in a file that was written with
    `torch.utils.serialization.config.save.compute_crc32 = False`: such entries are not checked.
    """
    with ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.CRC == 0:
                continue
            try:
                with archive.open(entry) as content:
                    while content.read(CHUNK):
                        pass  # the last read compares the sum
            except BadZipFile:
                raise Unreadable(
                    f"damaged: the checksum of its entry {entry.filename} does not match"
                ) from None


def _stand_in(name: str) -> Any:
    """Return what torch is to take for a class or function that a file names, and its name."""
    if name == "collections.defaultdict":
        return _empty, name
    return type("StandIn", (StandIn,), {"name": name}), name


def _load(path: Path, is_zip: bool) -> Any:
    if is_zip and path.suffix != ".safetensors":
        # Mapped, so that what is not used, such as an optimizer's state, takes no memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # An open file has no name by which torch would take it for one of another format.
    with path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _reason(error: Exception, unknown: list[str]) -> str:
    """Return why a file cannot be used, from what torch raised."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+) whose module", text):
        return f"it calls {found[1]}, as no file of weights does: do not load it at all"
    if found := re.search(r"GLOBAL (\S+) was not an allowed", text):
        return f"it needs {found[1]}, which is not run: {OF_CHECKPOINT}"
    if unknown:
        return f"it needs {first_few(unknown)}, which is not run: {OF_CHECKPOINT}"
    if "Unsupported operand" in text:
        return "its pickle is of a protocol that torch reads by running code: leave it the default"
    detail = re.split(r"WeightsUnpickler error:\s*|\n\nCheck the documentation", text)
    return f"truncated or damaged: {shortened(detail[1 if len(detail) > 2 else 0], 200)}"
