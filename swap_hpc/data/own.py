"""Data sets of a user's own, by import path."""

from dataclasses import replace
from inspect import signature
from typing import Any

import numpy as np

from swap_hpc.data.splits import Arrays, Dataset, with_statistics
from swap_hpc.errors import UserError
from swap_hpc.recipe.imports import imported
from swap_hpc.recipe.schema import Data


def own(data: Data) -> Dataset:
    """What the function that a recipe names returns for `data.path` and `data.arguments`.

    It returns a `Dataset`, or arrays: ((images, labels), (test images, test labels)), images (N, H, W, C) uint8, labels (N,)
    integers from 0. Raises UserError for anything else.
    """
    function = imported(data.name, "the data")
    try:
        signature(function).bind(data.path, **data.arguments)
    except TypeError as error:
        raise UserError(
            f"the data {data.name} is called with data.path and data.arguments, and refuses them: {error}"
        ) from None
    found = function(data.path, **data.arguments)
    if isinstance(found, Dataset):
        return _complete(data.name, found)
    try:
        (images, labels), (test_images, test_labels) = found
    except (TypeError, ValueError):
        kind = type(found).__name__
        raise UserError(
            f"the data {data.name} returned a {kind}: a Dataset, or ((images, labels), (images, labels)), is needed"
        ) from None
    train, test = _arrays(data.name, images, labels), _arrays(data.name, test_images, test_labels)
    if train.images.shape[1:] != test.images.shape[1:]:
        shapes = f"{list(train.images.shape[1:])} and {list(test.images.shape[1:])}"
        raise UserError(
            f"the data {data.name} returned images of {shapes} to train and to test on: they have to be alike"
        )
    classes = range(1 + int(max(train.labels.max(), test.labels.max())))
    return with_statistics(train, test, tuple(map(str, classes)))


def _complete(name: str, found: Dataset) -> Dataset:
    """A data set of arrays with what is missing of its size and statistics. Raises UserError."""
    if not len(found.train) or not len(found.test):
        raise UserError(
            f"the data {name} returned a Dataset without samples to train or to test on"
        )
    if not isinstance(found.train, Arrays) or not isinstance(found.test, Arrays):
        return found
    train, test = (_arrays(name, split.images, split.labels) for split in (found.train, found.test))
    made = with_statistics(train, test, found.classes)
    return replace(made, mean=found.mean or made.mean, std=found.std or made.std)


def _arrays(name: str, images: Any, labels: Any) -> Arrays:
    try:
        images, labels = np.asarray(images), np.asarray(labels)
    except ValueError as error:
        raise UserError(
            f"the data {name} returned what is no array ({error}): images have to be (N, H, W, C) uint8"
        ) from None
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
        raise UserError(
            f"the data {name} returned images {list(images.shape)} {images.dtype}: they have to be (N, H, W, C) uint8"
        )
    if images.shape[3] > 4 and images.shape[1] in (1, 3, 4):
        raise UserError(
            f"the data {name} returned images {list(images.shape)}, which look like (N, C, H, W): images.transpose(0, 2, 3, 1)"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(
            f"the data {name} returned labels {list(labels.shape)} {labels.dtype}: they have to be (N,) integers from 0"
        )
    return Arrays(np.ascontiguousarray(images), labels.astype(np.int64))
