"""A `Dataset` that a user's own function returns: checked, and completed where it may be."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from swap_hpc.data.custom_arrays import check_shapes, checked_arrays, checked_targets
from swap_hpc.data.dataset import Dataset, with_statistics
from swap_hpc.data.normalisation import IMAGENET_MEAN, IMAGENET_STD
from swap_hpc.data.splits import Arrays, Batches, Files, Shards
from swap_hpc.errors import UserError
from swap_hpc.recipe.inputs import Data

KINDS = (Arrays, Files | Shards, Batches)  # the splits of a data set are all of one


def completed(found: Dataset, data: Data) -> Dataset:
    """Fill in the image size and the statistics that a data set of images lacks.

    Raises:
        UserError: it is not what `Dataset` describes.
    """
    _check_kinds(found, data.name)
    found = replace(found, classes=_names(found.classes, data.name))
    _check_numbers(found, data.name)
    if isinstance(found.train, Batches):
        return found
    of_files = isinstance(found.train, Files | Shards)
    images = _with_files(found, data) if of_files else _with_arrays(found, data.name)
    for field in ("mean", "std"):
        given = getattr(images, field)
        if len(given) != images.channels:
            raise UserError(
                f"the data {data.name} returned a Dataset whose {field} has {len(given)} numbers, "
                f"but the images have {images.channels} channels: give one for each"
            )
    return images


def _check_kinds(found: Dataset, name: str) -> None:
    for key, split in found.splits.items():
        if not isinstance(split, Arrays | Files | Shards | Batches):
            raise UserError(
                f"the data {name} returned a Dataset whose {key} is a {type(split).__name__}: "
                f"{_hint(split)}"
            )
    splits = found.splits
    if not any(all(isinstance(split, kind) for split in splits.values()) for kind in KINDS):
        listed = ", ".join(f"{key} {type(split).__name__}" for key, split in splits.items())
        raise UserError(
            f"the data {name} returned a Dataset of different kinds of splits ({listed}): "
            "make all of them one kind"
        )


def _hint(split: Any) -> str:
    if isinstance(split, tuple | list):
        return "write a pair of arrays as swap_hpc.data.Arrays(images, labels)"
    if hasattr(split, "__getitem__") and hasattr(split, "__len__"):
        return "read a torch Dataset with swap_hpc.Batches.of(dataset)"
    return "an Arrays, Files, Batches or Graph is needed"


def _names(classes: Any, name: str) -> tuple[Any, ...]:
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        number = classes if isinstance(classes, int) else 10
        raise UserError(
            f"the data {name} returned a Dataset with classes = {classes!r}: their names are "
            f"needed, for example tuple(map(str, range({number})))"
        )
    return tuple(classes)


def _check_numbers(found: Dataset, name: str) -> None:
    if not len(found.train) or not len(found.test):
        raise UserError(
            f"the data {name} returned a Dataset without samples to train or to test on: "
            "it needs both"
        )
    if found.validation is not None and not len(found.validation):
        raise UserError(
            f"the data {name} returned a Dataset with an empty validation split: leave it out"
        )


def _with_arrays(found: Dataset, name: str) -> Dataset:
    arrays = {
        key: checked_arrays(name, split)
        for key, split in found.splits.items()
        if isinstance(split, Arrays)
    }
    check_shapes(name, arrays["train"], arrays.items())
    made = with_statistics(arrays["train"], arrays["test"], found.classes, arrays.get("validation"))
    return replace(made, mean=found.mean or made.mean, std=found.std or made.std, notes=found.notes)


def _with_files(found: Dataset, data: Data) -> Dataset:
    """Complete a data set whose images are read in every epoch, as one of a folder is."""
    side = data.last_size
    size = (side, side) if side else found.image_size
    if not all(size):
        raise UserError(
            f"the data {data.name} returned a Dataset of files without an image_size: "
            "set data.image_size (pixels)"
        )
    if found.channels != 3:
        raise UserError(
            f"the data {data.name} returned a Dataset of files with channels = {found.channels}: "
            "files are read with 3"
        )
    splits = {key: _checked_files(data.name, split) for key, split in found.splits.items()}
    return replace(
        found,
        train=splits["train"],
        test=splits["test"],
        validation=splits.get("validation"),
        image_size=size,
        mean=found.mean or IMAGENET_MEAN,
        std=found.std or IMAGENET_STD,
    )


def _checked_files(name: str, split: Any) -> Files | Shards:
    if isinstance(split, Files):
        split = replace(split, paths=tuple(map(str, split.paths)))
        return replace(split, labels=checked_targets(name, split.labels, len(split.paths)))
    return replace(split, labels=checked_targets(name, split.labels, len(split.tar)))
