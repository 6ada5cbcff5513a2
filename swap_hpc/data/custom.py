"""Data sets made by a user's own function, which a recipe names by its import path."""

from collections.abc import Iterable
from dataclasses import replace
from inspect import signature
from typing import Any

import numpy as np

from swap_hpc.data.dataset import Dataset, with_statistics
from swap_hpc.data.splits import Arrays
from swap_hpc.errors import UserError
from swap_hpc.recipe.imports import imported, in_one_line
from swap_hpc.recipe.inputs import Data

# The end of messages about what a user's function returned.
ANYTHING_ELSE = "for anything but images and classes, return a Dataset of swap_hpc.Batches"


def load_custom(data: Data) -> Dataset:
    """Call the function that a recipe names, and check what it returns.

    The function takes `data.path` and `data.arguments`. It returns a `Dataset`, or arrays:
    `((images, labels), (test images, test labels))`, images (N, H, W, C) uint8, labels (N,)
    integers from 0. Of three pairs, the second is the validation split.

    Raises:
        UserError: the function does not take these arguments, or returns anything else.
    """
    function = imported(data.name, "the data")
    try:
        signature(function).bind(data.path, **data.arguments)
    except TypeError as error:
        raise UserError(
            f"the data {data.name} cannot be called with data.path and data.arguments: {error}"
        ) from None
    with in_one_line(f"the data {data.name} failed"):
        found = function(data.path, **data.arguments)
    if isinstance(found, Dataset):
        return _complete(data.name, found)
    return _from_arrays(data.name, found)


def _complete(name: str, found: Dataset) -> Dataset:
    """Fill in the image size and the statistics that a data set of arrays lacks."""
    if not len(found.train) or not len(found.test):
        raise UserError(
            f"the data {name} returned a Dataset without samples to train or to test on: "
            "it needs both"
        )
    if found.validation is not None and not len(found.validation):
        raise UserError(
            f"the data {name} returned a Dataset with an empty validation split: leave it out"
        )
    arrays = {
        key: _arrays(name, split.images, split.labels)
        for key, split in found.splits.items()
        if isinstance(split, Arrays)
    }
    if len(arrays) < len(found.splits):
        return found
    _check_shapes(name, arrays["train"], arrays.items())
    made = with_statistics(arrays["train"], arrays["test"], found.classes, arrays.get("validation"))
    return replace(made, mean=found.mean or made.mean, std=found.std or made.std, notes=found.notes)


def _from_arrays(name: str, found: Any) -> Dataset:
    try:
        pairs = [(images, labels) for images, labels in found]
        first, *between, last = pairs
        validation = between[0] if between else None
        if len(between) > 1:
            raise ValueError("too many pairs")
    except (TypeError, ValueError):
        raise UserError(
            f"the data {name} returned a {type(found).__name__}: a Dataset, or ((images, labels), "
            f"(test images, test labels)), is needed; {ANYTHING_ELSE}"
        ) from None
    train, test = _arrays(name, *first), _arrays(name, *last)
    others = {"test": test}
    if validation:
        others["validation"] = _arrays(name, *validation)
    _check_shapes(name, train, others.items())
    classes = 1 + int(max(each.labels.max() for each in (train, *others.values())))
    names = tuple(map(str, range(classes)))
    return with_statistics(train, test, names, others.get("validation"))


def _check_shapes(name: str, train: Arrays, splits: Iterable[tuple[str, Arrays]]) -> None:
    """Raise UserError where a split's images have another shape than those of training."""
    shape = train.images.shape[1:]
    for split, arrays in splits:
        if shape != arrays.images.shape[1:]:
            raise UserError(
                f"the data {name} returned training images of {list(shape)} and {split} images of "
                f"{list(arrays.images.shape[1:])}: they must have the same shape"
            )


def _arrays(name: str, images: Any, labels: Any) -> Arrays:
    """Check one split's images and labels.

    Raises:
        UserError: they are not (N, H, W, C) uint8 and (N,) integers from 0.
    """
    try:
        images, labels = np.asarray(images), np.asarray(labels)
    except ValueError as error:
        raise UserError(
            f"the data {name} returned something that is not an array ({error}): "
            f"images must be (N, H, W, C) uint8; {ANYTHING_ELSE}"
        ) from None
    shape = list(images.shape)
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
        raise UserError(
            f"the data {name} returned images {shape} {images.dtype}: "
            f"they must be (N, H, W, C) uint8; {ANYTHING_ELSE}"
        )
    # images have 1, 3 or 4 channels; five or more are more likely the width
    if images.shape[3] > 4 and images.shape[1] in (1, 3, 4):
        raise UserError(
            f"the data {name} returned images {shape}, which look like (N, C, H, W): "
            "use images.transpose(0, 2, 3, 1)"
        )
    one_per_image = labels.shape == images.shape[:1]
    if not one_per_image or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(
            f"the data {name} returned labels {list(labels.shape)} {labels.dtype}: "
            f"they must be (N,) integers from 0; {ANYTHING_ELSE}"
        )
    return Arrays(np.ascontiguousarray(images), labels.astype(np.int64))
