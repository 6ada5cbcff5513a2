"""A folder of images, packed into WebDataset shards by all ranks together.

`shards` describes the files, and reads them.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from swap_hpc.data.dataset import SplitName
from swap_hpc.data.folders import folder_files
from swap_hpc.data.shards import CLASSES, INDEX_VERSION, LABELS, Component, classes_text
from swap_hpc.data.split_names import unread_splits
from swap_hpc.data.splits import Files
from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.atomic import write_text, write_whole
from swap_hpc.parallel.teams import Team

FOLDERS: dict[SplitName, str] = {"train": "train", "validation": "val", "test": "test"}
PACKING = "packing.json"  # beside the splits' folders: what was packed
IMAGES = re.compile(
    "bmp|dib|gif|j2k|jp2|jpc|jpe|jpeg|jpf|jpg|jpx|pbm|pgm|png|pnm|ppm|tif|tiff|webp"
)  # extensions that are kept


def pack(
    source: Path, out: Path, samples_per_shard: int, world: Team, report: Callable[[str], None]
) -> int:
    """Pack `train`, `val` and `test` of a folder into shards. Collective over `world`.

    Each shard holds samples of all classes, in an order that is always the same, and has DALI's
    index file beside it. The ranks share the shards out; whole ones that exist are left alone.

    Args:
        source: a folder as `data.name = "folder"` takes it.
        out: the folder for the shards.
        samples_per_shard: the most samples in one tar file.
        world: all ranks.
        report: takes a line about the progress, on every rank.

    Returns:
        The number of shards.

    Raises:
        UserError: the source is wrong, or `out` holds shards of something else; on all ranks.
        RunError: a file cannot be read or written; on all ranks.
    """
    unread = world.agree(lambda: unread_splits(source))
    files_of, classes = world.agree(lambda: folder_files(source))
    names = world.agree(lambda: classes_text(classes))
    for note in (*unread, *(note for files in files_of.values() for note in files.notes)):
        report(note)
    splits = {FOLDERS[name]: files for name, files in files_of.items()}
    world.first(lambda: _claim(out, splits, samples_per_shard))
    shards = 0
    for name, files in splits.items():
        # a fixed key: the order must be the same when packing continues
        order = np.random.Generator(np.random.Philox(len(files))).permutation(len(files))
        number_of_shards = -(-len(files) // samples_per_shard)  # rounded up
        parts = np.array_split(order, number_of_shards)
        for first in range(0, number_of_shards, world.size):
            mine = first + world.rank
            tar = out / name / f"{mine:06d}.tar"
            write = partial(_write, files, parts[mine], tar) if mine < len(parts) else _nothing
            world.agree(write)
            done = min(first + world.size, number_of_shards)
            report(f"{name}: {done} of {number_of_shards} shards")
        world.first(partial(write_whole, out / name / LABELS, partial(_save, files.labels)))
        shards += number_of_shards
    world.first(lambda: write_whole(out / CLASSES, lambda path: path.write_bytes(names)))
    return shards


def _claim(out: Path, splits: Mapping[str, Files], samples_per_shard: int) -> None:
    """Record what is packed into a folder.

    Raises:
        UserError: the folder holds shards of something else.
    """
    digest = hashlib.sha256()
    for files in splits.values():
        for file, label in zip(map(Path, files.paths), files.labels, strict=True):
            digest.update(os.fsencode(f"{file.name} {file.stat().st_size} {label}\n"))
    packing = {
        "samples_per_shard": samples_per_shard,
        "images": {name: len(files) for name, files in splits.items()},
        "sha256": digest.hexdigest(),
    }
    text = json.dumps(packing, indent=2) + "\n"
    record = out / PACKING
    recorded = record.read_text(encoding="utf-8") if record.is_file() else None
    has_shards = any(out.glob("*/*.tar"))
    if recorded != text and (recorded is not None or has_shards):
        raise UserError(
            f"{out} holds shards of other images, or of another --samples-per-shard: "
            "choose another folder, or remove it"
        )
    write_text(record, text)


def _nothing() -> None:
    pass


def _save(labels: np.ndarray, path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, labels)


def _write(files: Files, samples: np.ndarray, tar: Path) -> None:
    """Write a shard and its index, unless both exist."""
    index_file = tar.with_suffix(".idx")
    if tar.is_file() and index_file.is_file():
        return
    tar.parent.mkdir(parents=True, exist_ok=True)
    index: list[list[Component]] = []
    write_whole(tar, lambda path: index.extend(_write_tar(files, samples.tolist(), path)))
    text = _index_text(index)
    write_whole(index_file, lambda path: path.write_text(text, encoding="utf-8"))


def _write_tar(files: Files, samples: Sequence[int], tar: Path) -> list[list[Component]]:
    """Write images and labels into a tar file, byte for byte the same every time.

    A sample's key is its number, so that sorting by key gives back the order of `files`. An image
    with an extension that is not in `IMAGES` is stored as a .jpg: its own may mean something else
    to a reader, or not fit in an index. A decoder goes by the content, not the name.

    Returns:
        The components of each sample, for the index.

    Raises:
        RunError: an image cannot be read.
        OSError: the tar file cannot be written.
    """
    index = []
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            path = Path(files.paths[sample])
            extension = path.suffix.lstrip(".").lower()
            if not IMAGES.fullmatch(extension):
                extension = "jpg"
            key = f"{sample:09d}"
            image = _add(archive, key, extension, _content(path))
            label = _add(archive, key, "cls", str(files.labels[sample]).encode())
            index.append([image, label])
    return index


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None


def _add(archive: tarfile.TarFile, key: str, extension: str, content: bytes) -> Component:
    member = tarfile.TarInfo(f"{key}.{extension}")
    member.size = len(content)
    begin = archive.offset + tarfile.BLOCKSIZE  # a member's header is one block
    archive.addfile(member, io.BytesIO(content))
    return extension, begin, len(content), member.name


def _index_text(index: Sequence[Sequence[Component]]) -> str:
    """Return an index as DALI's `wds2idx` writes it: a line for each sample."""
    lines = [f"{INDEX_VERSION} {len(index)}"]
    for sample in index:
        fields = (f"{ext} {offset} {size} {name}" for ext, offset, size, name in sample)
        lines.append(" ".join(fields))
    return "\n".join(lines) + "\n"
