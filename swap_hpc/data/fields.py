"""Which fields of a recipe have an effect on which data; elsewhere they keep their defaults."""

from collections.abc import Callable
from dataclasses import dataclass

from swap_hpc.data.dataset import Dataset
from swap_hpc.data.splits import Arrays, Batches, Files, Shards
from swap_hpc.errors import UserError
from swap_hpc.recipe.augment import JITTERS, Augment
from swap_hpc.recipe.inputs import Data
from swap_hpc.recipe.wording import first_few


@dataclass(frozen=True)
class Use:
    """The data that a field is for."""

    name: str
    applies: Callable[[Data, Dataset], bool]


def _are_images(data: Data, dataset: Dataset) -> bool:
    return not isinstance(dataset.train, Batches)


def _are_streamed(data: Data, dataset: Dataset) -> bool:
    return isinstance(dataset.train, Files | Shards)


def _are_read_here(data: Data, dataset: Dataset) -> bool:
    """Tell whether the package found the files, and chose whether to keep them in memory."""
    decoded = isinstance(dataset.train, Arrays) and bool(dataset.train.files)
    return ":" not in data.name and (decoded or _are_streamed(data, dataset))


ALWAYS = Use("any data", lambda data, dataset: True)
IMAGES = Use("images that the package reads or holds in memory", _are_images)
STREAMED = Use("image files that are read in every epoch", _are_streamed)
READ_HERE = Use("image files and shards", _are_read_here)
SYNTHETIC = Use("synthetic data", lambda data, dataset: data.name == "synthetic")
ON_DISK = Use(
    "data that lie in a folder", lambda data, dataset: data.name not in ("digits", "synthetic")
)
SIZED = Use(
    "image files, shards and synthetic data",
    lambda data, dataset: any(
        use.applies(data, dataset) for use in (STREAMED, READ_HERE, SYNTHETIC)
    ),
)
FOLDER = Use("a folder of images", lambda data, dataset: data.name == "folder")
OWN = Use("a function of your own", lambda data, dataset: ":" in data.name)

# Every field of [data]; those of [augment] are for images.
USES = {
    "name": ALWAYS,
    "arguments": OWN,
    "path": ON_DISK,
    "test_every": FOLDER,
    "validation": ALWAYS,
    "image_size": SIZED,
    "evaluation_size": STREAMED,
    "evaluation_crop": STREAMED,
    "memory_gib": READ_HERE,
    "mean": IMAGES,
    "std": IMAGES,
    "classes": SYNTHETIC,
    "samples": SYNTHETIC,
}

OPERATIONS = ("randaugment", "trivial_augment", *JITTERS)


def check_fields(data: Data, augment: Augment, dataset: Dataset) -> None:
    """Check that no field of `[data]` and `[augment]` is set that has no effect on a data set.

    A field that is set to its default counts as not set: a resolved recipe lists all of them.

    Raises:
        UserError: one is, or the augmentation does not fit the images; it is named.
    """
    for name, use in USES.items():
        _check("data", name, data, use, data, dataset)
    for name in Augment.model_fields:
        _check("augment", name, augment, IMAGES, data, dataset)
    if len(data.image_size or ()) > 1 and not _are_streamed(data, dataset):
        raise UserError(
            f"data.image_size has several sizes: only {STREAMED.name} change theirs, "
            f"and {_described(data, dataset)}"
        )
    if isinstance(dataset.train, Batches):
        return
    labels = dataset.train.labels
    if augment.mixes and (labels.ndim > 1 or labels.dtype.kind == "f"):
        raise UserError(
            "augment.mixup and augment.cutmix mix class numbers, and the targets of "
            f"{data.name} are something else: leave them out"
        )
    if augment.mixes and (largest := int(labels.max())) >= len(dataset.classes):
        raise UserError(
            f"augment.mixup and augment.cutmix mix class numbers, and {data.name} has the label "
            f"{largest} beside these classes: {first_few(dataset.classes) or 'none'}"
        )
    if augment.operates and dataset.channels != 3:
        wanted = [name for name in OPERATIONS if getattr(augment, name)]
        raise UserError(
            f"augment.{wanted[0]} is for images of 3 channels (red, green, blue), and "
            f"{_described(data, dataset)} with {dataset.channels}: leave it out"
        )
    _check_sizes(data, augment, dataset)


def _check(
    section: str, name: str, fields: Data | Augment, use: Use, data: Data, dataset: Dataset
) -> None:
    value = getattr(fields, name)
    is_default = value == type(fields).model_fields[name].default
    if is_default or use.applies(data, dataset):
        return
    raise UserError(
        f"{section}.{name} has no effect here (given: {value}): it is for {use.name}, "
        f"and {_described(data, dataset)}; leave it out"
    )


def _described(data: Data, dataset: Dataset) -> str:
    """Return what a data set is, as the end of a sentence."""
    if isinstance(dataset.train, Batches):
        return f"{data.name} makes its batches itself"
    where = "are in memory" if isinstance(dataset.train, Arrays) else "are read in every epoch"
    if ":" in data.name or data.name in ("folder", "webdataset"):
        return f"the images of {data.name} {where}"
    return f"{data.name} {where}"


def _check_sizes(data: Data, augment: Augment, dataset: Dataset) -> None:
    """Check that padding and cutout fit the images, also the smallest."""
    sides = [*dataset.image_size]
    if _are_streamed(data, dataset):
        sides += [pixels for _, pixels in data.image_size or ()]
    pixels = min(sides)
    pad, cutout = augment.pad, augment.cutout
    if pad >= pixels or cutout > pixels:
        raise UserError(
            f"augment.pad = {pad} and augment.cutout = {cutout} do not fit images of "
            f"{pixels} pixels: make them smaller"
        )
