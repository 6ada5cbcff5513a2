"""A folder of images, packed into WebDataset shards by all ranks."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from swap_hpc.data.shards import CLASSES, LABELS, classes_text, index_text, write_shard
from swap_hpc.data.sources import folder_files
from swap_hpc.data.splits import Files
from swap_hpc.errors import UserError
from swap_hpc.parallel.atomic import write_text, write_whole
from swap_hpc.parallel.teams import Team

PACKING = "packing.json"  # beside the splits' folders: what was packed


def pack(
    source: Path, out: Path, samples_per_shard: int, world: Team, tell: Callable[[str], None]
) -> int:
    """Packs `train` and `test` of a folder as `data.name = "folder"` takes it. Returns the number of shards.

    Each shard holds samples of all classes, in an order that is always the same, and has DALI's index file beside it. The ranks
    share the shards out; those that are there already, whole, are left alone. Raises UserError and RunError, on all ranks.
    """
    train, test, classes = world.agree(lambda: folder_files(source))
    names = world.agree(lambda: classes_text(classes))
    for note in train.notes + test.notes:
        tell(note)
    world.first(lambda: _claim(out, {"train": train, "test": test}, samples_per_shard))
    shards = 0
    for name, files in (("train", train), ("test", test)):
        order = np.random.Generator(np.random.Philox(len(files))).permutation(len(files))
        parts = np.array_split(order, -(-len(files) // samples_per_shard))
        for number in range(0, len(parts), world.size):  # the ranks side by side
            mine = number + world.rank
            world.agree(
                partial(_write, files, parts[mine], out / name / f"{mine:06d}.tar")
                if mine < len(parts)
                else _nothing
            )
            tell(f"{name}: {min(number + world.size, len(parts))} of {len(parts)} shards")
        world.first(partial(write_whole, out / name / LABELS, partial(_save, files.labels)))
        shards += len(parts)
    world.first(lambda: write_whole(out / CLASSES, lambda path: path.write_bytes(names)))
    return shards


def _claim(out: Path, splits: Mapping[str, Files], samples_per_shard: int) -> None:
    """Writes down what is packed here. Raises UserError where something else was."""
    digest = hashlib.sha256()
    for files in splits.values():
        for path, label in zip(files.paths, files.labels, strict=True):
            digest.update(os.fsencode(f"{Path(path).name} {Path(path).stat().st_size} {label}\n"))
    packing = {
        "samples_per_shard": samples_per_shard,
        "images": {k: len(files) for k, files in splits.items()},
        "sha256": digest.hexdigest(),
    }
    text, file = json.dumps(packing, indent=2) + "\n", out / PACKING
    there = file.read_text(encoding="utf-8") if file.is_file() else None
    if there != text and (there is not None or any(out.glob("*/*.tar"))):
        raise UserError(
            f"{out} holds shards of other images, or of another --samples-per-shard: choose another folder, or remove it"
        )
    write_text(file, text)


def _nothing() -> None:
    pass


def _save(labels: np.ndarray, path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, labels)


def _write(files: Files, samples: np.ndarray, tar: Path) -> None:
    index = tar.with_suffix(".idx")
    if tar.is_file() and index.is_file():
        return
    tar.parent.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    write_whole(
        tar, lambda path: written.append(index_text(write_shard(files, samples.tolist(), path)))
    )
    write_whole(index, lambda path: path.write_text(written[0], encoding="utf-8"))
