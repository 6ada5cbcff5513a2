"""Image files decoded into memory: each rank of a node decodes a part for all of them."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from swap_hpc.data.dataset import (
    Dataset,
    SplitName,
    count_levels,
    normalised_by,
    with_validation,
)
from swap_hpc.data.decode import decode_into, image_shapes
from swap_hpc.data.encoded import Encoded
from swap_hpc.data.normalisation import IMAGENET_MEAN, IMAGENET_STD
from swap_hpc.data.one_copy import frame_form, noted, pads_of, with_splits
from swap_hpc.data.padding import inside, reflect_
from swap_hpc.data.pieces import pixels_within
from swap_hpc.data.splits import Arrays, Files, Shards
from swap_hpc.errors import UserError
from swap_hpc.parallel.shared_memory import part_of, shared_arrays
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.inputs import Data


@dataclass(frozen=True)
class Decoding:
    """How image files are decoded into memory."""

    size: tuple[int, int] | None  # as in `decode_into`
    threads: int  # of the CPU, for this rank
    pixels: int  # the most that a rank decodes at once
    pad: int  # by which training images are padded


def from_files(found: Dataset, data: Data, node: Team, threads: int, pad: int) -> Dataset:
    """Decode image files into memory if they fit in `data.memory_gib`; collective over `node`.

    Otherwise, or if the recipe sets several sizes, they are read in every epoch.

    Args:
        found: the files; the same on all ranks.
        data: the recipe's section `[data]`.
        node: the ranks on this node.
        threads: CPU threads that this rank decodes with.
        pad: by which training images in memory are padded.

    Raises:
        UserError: an image cannot be decoded, or the recipe must set a size; on all ranks of the
            node.
    """
    side = data.last_size
    size = (side, side) if side else None
    pixels = pixels_within(data.memory_gib)
    height, width = size or _first_size(found, threads, node)
    parts = node.agree(lambda: with_validation(found, data.validation))
    bytes_in_memory = sum(map(len, found.splits.values())) * height * width * 3
    several_sizes = len(data.image_size or ()) > 1
    if bytes_in_memory <= data.memory_gib * 2**30 and not several_sizes:
        if size is None:
            _check_sizes(parts, (height, width), threads, node)
        decoding = Decoding(size, threads, pixels, pad)
        return _decoded(parts, found, (height, width), decoding, node)
    if size is None:
        raise UserError(
            f"{data.path} is larger than data.memory_gib = {data.memory_gib}: "
            "set data.image_size (pixels) to read it in every epoch, or allow more memory"
        )
    # a pass over all images for their own statistics would take as long as an epoch
    return replace(
        parts, image_size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD, pixels_at_once=pixels
    )


def _first_size(found: Dataset, threads: int, node: Team) -> tuple[int, int]:
    """Return the (height, width) of the first training image; collective."""
    shapes = node.agree(lambda: image_shapes(_encoded(found)["train"], range(1), threads))
    height, width, _ = node.broadcast(shapes[0].tolist())
    return height, width


def _encoded(dataset: Dataset) -> dict[SplitName, Encoded]:
    """Return the splits of a data set of files."""
    return {
        name: split for name, split in dataset.splits.items() if isinstance(split, Files | Shards)
    }


def _check_sizes(parts: Dataset, expected: tuple[int, int], threads: int, node: Team) -> None:
    """Check that all images have the same size; each rank checks a part. Collective.

    Raises:
        UserError: on all ranks, an image cannot be read, or has another size.
    """
    for split in _encoded(parts).values():
        node.agree(partial(_check_size, split, part_of(len(split), node), expected, threads))


def _check_size(split: Encoded, rows: range, expected: tuple[int, int], threads: int) -> None:
    sizes = image_shapes(split, rows, threads)[:, :2]
    others = np.flatnonzero((sizes != expected).any(axis=1))
    if len(others):
        (height, width), name = sizes[others[0]], split.name(rows[others[0]])
        raise UserError(
            f"the images differ in size (the first one is {expected[1]}x{expected[0]}, "
            f"{name} is {width}x{height}): set data.image_size (pixels)"
        )


def _decoded(
    parts: Dataset, found: Dataset, size: tuple[int, int], decoding: Decoding, node: Team
) -> Dataset:
    """Return the decoded data set; collective.

    Args:
        parts: the files of the splits, in which some of the training samples may be set aside.
        found: the files of the splits as they were found.
        size: (height, width) of the images in pixels.
        decoding: how they are decoded.
        node: the ranks on this node.
    """
    splits = _encoded(parts)
    pads = pads_of(parts, decoding.pad, size)
    memory = shared_arrays(
        node,
        {name: frame_form((len(split), *size, 3), pads[name]) for name, split in splits.items()},
    )
    # the statistics are those of all training images, also of those set aside
    files: dict[SplitName, Encoded] = {**_encoded(found)}
    if found.validation is None and "validation" in splits:
        files["validation"] = files["train"]
    levels = np.zeros((3, 256), np.int64)

    def decode() -> None:
        for name, split in splits.items():
            rows, images = part_of(len(split), memory.team), inside(memory.arrays[name], pads[name])
            decode_into(images, split, rows, decoding.size, decoding.threads, decoding.pixels)
            reflect_(memory.arrays[name], pads[name], rows)
            if files[name] is files["train"]:
                levels[:] += count_levels(images, rows)

    memory.team.agree(decode)
    memory.team.sum_(levels)
    frames = memory.finished()
    arrays = {
        name: Arrays.in_frame(
            frames[name],
            pads[name],
            split.labels,
            "".join(files[name].contents),
            tuple(map(split.name, range(len(split)))),
        )
        for name, split in splits.items()
    }
    return noted(normalised_by(levels, with_splits(parts, arrays)), memory)
