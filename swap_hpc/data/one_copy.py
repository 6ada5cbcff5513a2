"""Data sets in memory, of which the ranks of a node hold one copy together.

Where they cannot share memory, each holds its own, as one rank would.
"""

import mmap
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from swap_hpc.data.dataset import Dataset, SplitName
from swap_hpc.data.padding import inside, reflect_
from swap_hpc.data.splits import Arrays
from swap_hpc.parallel.shared_memory import (
    MIN_BYTES,
    Form,
    SharedArrays,
    are_worth_sharing,
    part_of,
    shared_arrays,
)
from swap_hpc.parallel.teams import Team


def pads_of(dataset: Dataset, pad: int, size: tuple[int, int]) -> dict[SplitName, int]:
    """Return by how much each split's images of `size`, (height, width), are padded here.

    Padding that does not fit them is left out: `check_fields` will refuse it, and no memory is set
    aside for it before.
    """
    fitting = pad if pad < min(size) else 0
    return {name: fitting if name == "train" else 0 for name in dataset.splits}


def frame_form(shape: tuple[int, ...], pad: int) -> Form:
    """Return the form of images (N, H, W, C) that are padded."""
    number, height, width, channels = shape
    return Form((number, height + 2 * pad, width + 2 * pad, channels), "uint8")


def with_splits(dataset: Dataset, splits: dict[SplitName, Arrays]) -> Dataset:
    """Return a data set with other splits."""
    train, test, validation = splits["train"], splits["test"], splits.get("validation")
    return replace(dataset, train=train, test=test, validation=validation)


def noted(dataset: Dataset, memory: SharedArrays) -> Dataset:
    """Return a data set with a line, where the ranks of a node should share it and cannot."""
    if not memory.refused:
        return dataset
    size = sum(array.nbytes for array in memory.arrays.values()) / 2**20
    note = (
        f"each rank holds the images for itself, {size:.0f} MiB: the ranks of a node cannot share "
        f"memory here ({memory.refused})"
    )
    return replace(dataset, notes=(*dataset.notes, note))


def made_once(make: Callable[[], Dataset], node: Team, pad: int) -> Dataset:
    """Return the data set that the node's first rank makes, on all of its ranks; collective.

    Args:
        make: makes a data set in memory; the same one on all ranks.
        node: the ranks on this node.
        pad: by which training images are padded.
    """
    made = node.first(make)
    if node.size == 1:
        assert made is not None
        return made
    outlined = node.first(lambda: _outlined(made, pad))  # type: ignore[arg-type]
    outline, forms = node.broadcast(outlined)  # type: ignore[misc]
    if not are_worth_sharing(forms):
        return node.broadcast(made)  # type: ignore[return-value]
    memory = shared_arrays(node, forms)
    if memory.refused:
        return noted(made or make(), memory)
    return _placed(outline, memory, made, pad)


def shared(dataset: Dataset, node: Team, pad: int) -> Dataset:
    """Return the data set that each rank of a node has made, of which they keep one copy.

    Collective over `node`. Other data than arrays in memory are returned as they are. So are arrays
    that map a file, which may be larger than the memory.
    """
    splits = _in_memory(dataset).values()
    mapped = any(_maps_a_file(each) for split in splits for each in (split.images, split.labels))
    if node.any(mapped) or not splits or node.size == 1:
        return dataset
    memory = shared_arrays(node, _forms(dataset, pad))
    if memory.team.size == 1:
        return noted(dataset, memory)
    return _placed(dataset, memory, dataset, pad)


def _in_memory(dataset: Dataset) -> dict[SplitName, Arrays]:
    return {name: split for name, split in dataset.splits.items() if isinstance(split, Arrays)}


def _maps_a_file(array: np.ndarray) -> bool:
    base = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base  # type: ignore[assignment]
    return isinstance(base, mmap.mmap)


def _forms(dataset: Dataset, pad: int) -> dict[str, Form]:
    """Return the forms of a data set's arrays, without small labels, which each rank keeps."""
    pads = pads_of(dataset, pad, dataset.image_size)
    forms: dict[str, Form] = {}
    for name, split in _in_memory(dataset).items():
        forms[name] = frame_form(split.images.shape, pads[name])
        if split.labels.nbytes >= MIN_BYTES:
            forms[f"{name} labels"] = Form(split.labels.shape, split.labels.dtype.str)
    return forms


def _outlined(dataset: Dataset, pad: int) -> tuple[Dataset, dict[str, Form]]:
    """Return a data set without the arrays that are shared, and the forms of these."""
    forms = _forms(dataset, pad)
    splits = {
        name: replace(
            split,
            images=split.images[:0],
            labels=split.labels[:0] if f"{name} labels" in forms else split.labels,
        ).with_contents(split.contents)
        for name, split in _in_memory(dataset).items()
    }
    return with_splits(dataset, splits), forms


def _placed(outline: Dataset, memory: SharedArrays, made: Dataset | None, pad: int) -> Dataset:
    """Copy the first rank's arrays into shared memory, and return the data set there; collective.

    Args:
        outline: the data set; its arrays do not matter, but for labels that are not shared.
        memory: the arrays of `_forms`.
        made: the data set; only the first rank's is used.
        pad: by which training images are padded.
    """
    pads, team = pads_of(outline, pad, outline.image_size), memory.team

    def copy() -> None:
        assert made is not None
        for name, split in _in_memory(made).items():
            inside(memory.arrays[name], pads[name])[:] = split.images
            if f"{name} labels" in memory.arrays:
                memory.arrays[f"{name} labels"][:] = split.labels

    def reflect() -> None:
        for name, width in pads.items():
            frame = memory.arrays[name]
            reflect_(frame, width, part_of(len(frame), team))

    team.first(copy)
    team.agree(reflect)
    arrays = memory.finished()
    splits = {
        name: Arrays.in_frame(
            arrays[name],
            pads[name],
            arrays.get(f"{name} labels", split.labels),
            split.files,
            split.names,
        ).with_contents(split.contents)
        for name, split in _in_memory(outline).items()
    }
    return with_splits(outline, splits)
