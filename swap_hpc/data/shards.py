"""WebDataset shards: tar files of images and labels, with DALI's index file beside each.

```
classes.txt           the classes' names, one per line
train/000000.tar      000000123.jpg, 000000123.cls, ...: an image and its class number per sample
train/000000.idx      where they lie in the tar file (optional)
train/labels.npy      (N,) int64, in the order of the samples' keys (optional)
val/...               (optional)
test/...
```

This module reads them, `pack` writes them.
"""

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np

from swap_hpc.data.splits import Shards
from swap_hpc.errors import RunError, UserError

INDEX_VERSION = "v1.2"  # of DALI's index files (wds2idx); older ones lack the members' names
NOT_IMAGES = ("cls", "txt", "json")  # extensions
CLASSES = "classes.txt"
LABELS = "labels.npy"

Component = tuple[str, int, int, str]  # extension, offset and size in bytes, name in the tar file
Place = tuple[int, int, int]  # number of the tar file, offset and size in bytes


def classes_text(classes: Sequence[str]) -> bytes:
    """Return the content of `CLASSES`, the names as they are on the disk, one per line.

    Raises:
        UserError: a name has a line break.
    """
    for name in classes:
        if re.search("[\r\n]", name):
            raise UserError(f"the class {name!r} has a line break in its name: rename its folder")
    return os.fsencode("".join(f"{name}\n" for name in classes))


def read_classes(file: Path) -> tuple[str, ...]:
    """Return the names that `classes_text` wrote."""
    text = os.fsdecode(file.read_bytes()).replace("\r\n", "\n")
    return tuple(text.removesuffix("\n").split("\n"))


@dataclass
class _Samples:
    """Samples as they are found in tar files; millions, so as plain numbers."""

    keys: list[str] = field(default_factory=list)  # the members' names, without extensions
    images: list[Place] = field(default_factory=list)
    labels: list[Place] = field(default_factory=list)


def find_shards(split: Path) -> Shards:
    """Find the samples in the tar files of a folder, in the order of their keys.

    Raises:
        UserError: there is none, a tar file or an index cannot be read, a sample is incomplete or
            there twice, or a label is wrong.
    """
    tars = sorted(split.glob("*.tar"))
    if not tars:
        raise UserError(
            f"no .tar files in {split}: swap-hpc pack makes them from a folder of images"
        )
    samples = _samples_of(tars)
    keys = samples.keys
    if not keys:
        raise UserError(
            f"the .tar files in {split} hold no sample: "
            "swap-hpc pack makes them from a folder of images"
        )
    order = np.argsort(np.array(keys), kind="stable")
    for one, following in pairwise(order):
        if keys[one] == keys[following]:
            raise UserError(
                f"{split}: its .tar files hold the sample {keys[one]} twice: "
                "remove the shards of another packing"
            )
    found = _as_shards(tars, samples.images, order)
    labels = _labels(split, _as_shards(tars, samples.labels, order))
    if labels.min() < 0:
        raise UserError(f"{split}: a class number is {labels.min()}: classes count from 0")
    return replace(found, labels=labels)


def _samples_of(tars: Sequence[Path]) -> _Samples:
    """List the samples of all tar files, in the order of the files."""
    found = _Samples()
    for number, tar in enumerate(tars):
        for parts in _components(tar):
            images = [part for part in parts if part[0] not in NOT_IMAGES]
            label = next((part for part in parts if part[0] == "cls"), None)
            if len(images) != 1 or label is None:
                raise UserError(
                    f"{tar}: the sample {parts[0][3]} needs one image and one .cls file "
                    "with the number of its class"
                )
            extension, offset, size, name = images[0]
            found.keys.append(name.removesuffix(f".{extension}"))
            found.images.append((number, offset, size))
            found.labels.append((number, label[1], label[2]))
    return found


def _as_shards(tars: Sequence[Path], places: Sequence[Place], order: np.ndarray) -> Shards:
    """Return the split of what lies at these places, with 0 for each label."""
    tar, offset, size = np.array(places, dtype=np.int64)[order].T
    labels = np.zeros(len(places), np.int64)
    return Shards(tuple(map(str, tars)), tar.astype(np.int32), offset, size, labels)


def _labels(split: Path, texts: Shards) -> np.ndarray:
    """Return the labels, (N,) int64, from `LABELS` if it exists, else from the .cls files."""
    if (split / LABELS).is_file():
        labels = np.load(split / LABELS)
        if len(labels) != len(texts):
            raise UserError(
                f"{split}: {LABELS} has {len(labels)} labels, "
                f"the .tar files hold {len(texts)} samples: pack again"
            )
        return labels
    try:
        return np.array([int(texts.read(i).tobytes()) for i in range(len(texts))], dtype=np.int64)
    except (ValueError, RunError) as error:
        raise UserError(
            f"{split}: a .cls file holds no number, or cannot be read ({error})"
        ) from None


def _components(tar: Path) -> Iterator[list[Component]]:
    """Yield each sample's components, from the index beside a tar file or the headers in it.

    Raises:
        UserError: the index is damaged, or the tar file cannot be read.
    """
    index = tar.with_suffix(".idx")
    lines = index.read_text(encoding="utf-8").splitlines() if index.is_file() else []
    if not lines or not lines[0].startswith(INDEX_VERSION):
        yield from _components_by_headers(tar)
        return
    for line in lines[1:]:
        fields = line.split(" ")
        try:
            # four fields for each component
            components = zip(*[iter(fields)] * 4, strict=True)
            yield [(ext, int(offset), int(size), name) for ext, offset, size, name in components]
        except ValueError:
            raise UserError(
                f"{index} is not a DALI index: make it again with wds2idx, or remove it"
            ) from None


def _components_by_headers(tar: Path) -> Iterator[list[Component]]:
    try:
        with tarfile.open(tar, "r:") as archive:
            members = [
                (_key_and_extension(member.name)[1], member.offset_data, member.size, member.name)
                for member in archive
                if member.isfile()
            ]
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"cannot read {tar}: {error}") from None
    # a sample's members follow one another
    for _, parts in groupby(members, lambda part: _key_and_extension(part[3])[0]):
        yield list(parts)


def _key_and_extension(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part: its folders may have dots, too."""
    folder, slash, file = name.rpartition("/")
    key, _, extension = file.partition(".")
    return f"{folder}{slash}{key}", extension
