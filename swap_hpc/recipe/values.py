"""The kinds of values that a recipe's fields have, with what makes one valid."""

import math
import os
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(gt=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Sizes: TypeAlias = tuple[tuple[CountOrZero, Count], ...]


def on_disk(text: Any) -> Any:
    """Return text of a recipe as a file name: in any locale, its UTF-8 bytes name the file.

    `from_disk` is the inverse. Anything but text is returned unchanged.
    """
    return os.fsdecode(text.encode()) if isinstance(text, str) else text


def from_disk(name: str | Path) -> str:
    """Return a file name as text for a recipe; the inverse of `on_disk`.

    Raises:
        UnicodeDecodeError: The name is not UTF-8.
    """
    return os.fsencode(name).decode()


def _expand_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("needs a path whose home directory exists") from None


def constant_as_pairs(value: Any) -> Any:
    """Return a plain number as a single pair at epoch 0, and a list of pairs as it is.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(value, int | float):
        return [[0, value]]
    if not isinstance(value, list | tuple) or not all(_is_pair(knot) for knot in value):
        raise ValueError("needs a number, or pairs from an epoch on: [[0, 0.1], [8, 0.0]]")
    return value


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def _sizes_as_pairs(value: Any) -> Any:
    """Return a plain number of pixels as a single pair at epoch 0, and a list of pairs as it is.

    Raises:
        ValueError: It is neither.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and value >= 1 and float(value).is_integer():
        return [[0, value]]
    if not isinstance(value, list | tuple) or not all(_is_pair(knot) for knot in value):
        raise ValueError(
            "needs a whole number of pixels, at least 1, or pairs from an epoch on: "
            "[[0, 128], [8, 160]]"
        )
    return value


def _epochs_ascend(pairs: Sizes) -> bool:
    return all(left < right for (left, _), (right, _) in pairwise(pairs))


def _checked_sizes(sizes: Sizes) -> Sizes:
    if not sizes or sizes[0][0] != 0 or not _epochs_ascend(sizes):
        raise ValueError(
            "needs [epoch, pixels] pairs in ascending order of their epochs, the first at epoch 0"
        )
    return sizes


def _checked_range(pair: tuple[float, float]) -> tuple[float, float]:
    low, high = pair
    if not 0 < low <= high:
        raise ValueError("needs two positive numbers, the smaller one first")
    return pair


def _checked_fractions(values: tuple[float, ...]) -> tuple[float, ...]:
    if not values or not all(0 <= value <= 1 for value in values):
        raise ValueError("needs a number from 0 to 1 for each channel (pixels are in [0, 1])")
    return values


def _checked_positive(values: tuple[float, ...]) -> tuple[float, ...]:
    if 0 in values:
        raise ValueError("needs numbers above 0 (images are divided by them)")
    return values


def _checked_name(*known: str) -> Callable[[str], str]:
    """Return a validator for a name: one of `known`, or the import path of a user's function."""

    def check(name: str) -> str:
        if name not in known and not re.fullmatch(r"[\w.]+:\w+", name):
            raise ValueError(f'needs {", ".join(known)} or "package.module:function"')
        return name

    return check


def check_finite(value: Any) -> None:
    """Raise ValueError if a number in nested dictionaries and lists is NaN or infinite.

    Runs write their recipe to JSON, which has neither.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            check_finite(each)


def one_as_several(value: Any) -> Any:
    """Return a text as a list of one, and anything else as it is."""
    return [value] if isinstance(value, str) else value


ImageSizes = Annotated[Sizes, BeforeValidator(_sizes_as_pairs), AfterValidator(_checked_sizes)]
Range = Annotated[tuple[float, float], AfterValidator(_checked_range)]

# One number for each channel, of pixels in [0, 1].
Fractions = Annotated[tuple[float, ...], AfterValidator(_checked_fractions)]
Statistics: TypeAlias = Fractions | Literal["imagenet"]
Deviations: TypeAlias = (
    Annotated[Fractions, AfterValidator(_checked_positive)] | Literal["imagenet"]
)

Place = Annotated[
    Path,
    BeforeValidator(on_disk),
    AfterValidator(_expand_home),
    PlainSerializer(from_disk, str, when_used="json"),
]

# Sources of images that the package reads itself.
DataName = Literal["digits", "cifar10", "cifar100", "folder", "webdataset", "synthetic"]

# Of forward passes.
Precision = Literal["fp32", "bf16", "fp16"]

DataSource = Annotated[str, AfterValidator(_checked_name(*get_args(DataName)))]
LossName = Annotated[str, AfterValidator(_checked_name("cross_entropy"))]
MetricName = Annotated[str, AfterValidator(_checked_name("accuracy", "top5", "class_accuracy"))]
