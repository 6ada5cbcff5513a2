"""The arrays that a user's own function returns, checked."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from swap_hpc.data.splits import Arrays
from swap_hpc.errors import UserError

# The end of messages about what a user's function returned.
ANYTHING_ELSE = "for anything but images and classes, return a Dataset of swap_hpc.Batches"


def checked_pair(name: str, images: Any, labels: Any) -> Arrays:
    """Check a pair of images and class numbers.

    Args:
        name: the function's.
        images: what should be (N, H, W, C) uint8.
        labels: what should be (N,) integers from 0.

    Raises:
        UserError: they are something else.
    """
    images, labels = _as_array(name, images), _as_array(name, labels)
    _check_images(name, images)
    one_per_image = labels.shape == images.shape[:1]
    if not one_per_image or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(
            f"the data {name} returned labels {list(labels.shape)} {labels.dtype}: "
            f"they must be (N,) integers from 0; {ANYTHING_ELSE}"
        )
    return Arrays(np.ascontiguousarray(images), labels.astype(np.int64))


def checked_arrays(name: str, split: Arrays) -> Arrays:
    """Check a split of a `Dataset`, whose labels may also be targets for a user's own loss.

    Args:
        name: the function's.
        split: what should be (N, H, W, C) uint8 and (N, ...) numbers.

    Raises:
        UserError: it is something else.
    """
    images = _as_array(name, split.images)
    _check_images(name, images)
    return Arrays(np.ascontiguousarray(images), checked_targets(name, split.labels, len(images)))


def checked_targets(name: str, labels: Any, samples: int) -> np.ndarray:
    """Return labels or targets as a model's loss takes them: int64, or float32.

    Args:
        name: the function's.
        labels: what should be (N, ...) numbers.
        samples: N.

    Raises:
        UserError: they are something else.
    """
    labels = _as_array(name, labels)
    if labels.shape[:1] != (samples,) or labels.dtype.kind not in "iufb":
        raise UserError(
            f"the data {name} returned labels {list(labels.shape)} {labels.dtype} for {samples} "
            "images: they must be (N,) integers from 0, or (N, ...) numbers for a loss of your own"
        )
    is_float = labels.dtype.kind == "f"
    return np.ascontiguousarray(labels.astype(np.float32 if is_float else np.int64))


def check_shapes(name: str, train: Arrays, splits: Iterable[tuple[str, Arrays]]) -> None:
    """Raise UserError where a split's images or targets have another shape than in training."""
    shape = train.images.shape[1:]
    for split, arrays in splits:
        if shape != arrays.images.shape[1:]:
            raise UserError(
                f"the data {name} returned training images of {list(shape)} and {split} images of "
                f"{list(arrays.images.shape[1:])}: they must have the same shape"
            )


def _as_array(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise UserError(
            f"the data {name} returned something that is not an array ({error}): "
            f"images must be (N, H, W, C) uint8; {ANYTHING_ELSE}"
        ) from None


def _check_images(name: str, images: np.ndarray) -> None:
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
