"""A data set: its splits, and what a model and the loader must know of them."""

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from swap_hpc.data.padding import in_parts
from swap_hpc.data.splits import Arrays, Batches, Split
from swap_hpc.errors import UserError

# "val" in ASCII. The key does not depend on the recipe's seed: runs with different seeds, which
# are compared with each other, set the same samples aside.
VALIDATION_KEY = 0x76616C

SplitName: TypeAlias = Literal["train", "validation", "test"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """What is trained and tested on.

    A user's own data set holds splits of one kind: `Arrays`, whose missing `image_size`, `mean` and
    `std` are computed; `Files`, for which `data.image_size` and ImageNet's two are taken; or
    `Batches` and `Graph`, which need none of the three.

    Attributes:
        train: the training split.
        test: the split that models are reported on.
        classes: the classes' names, in the order of their numbers. A model is built for their
            number and for `channels`.
        image_size: (height, width) in pixels, as the model sees the images.
        channels: channels of an image.
        mean: per channel, of pixels in [0, 255]; subtracted from them.
        std: the standard deviation per channel, of pixels in [0, 255]; they are divided by it.
        notes: lines to print about how the data were found.
        pixels_at_once: the most pixels that are decoded at once where image files are read in
            every epoch; always at least one image.
        validation: the split that choices are made by, and that epochs are evaluated on; None:
            they are evaluated on the test split.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    image_size: tuple[int, int] = (0, 0)
    channels: int = 3
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    pixels_at_once: int = 2**25
    validation: Split | None = None

    @property
    def splits(self) -> dict[SplitName, Split]:
        """The splits that there are, in the order training, validation, test."""
        found: dict[SplitName, Split] = {"train": self.train}
        if self.validation is not None:
            found["validation"] = self.validation
        return found | {"test": self.test}

    @property
    def chosen_by(self) -> SplitName:
        """The split that epochs are evaluated on."""
        return "test" if self.validation is None else "validation"

    @property
    def noun(self) -> str:
        """What the samples are called: "images", or "samples" where a user's code makes them."""
        return "samples" if isinstance(self.train, Batches) else "images"


def with_validation(dataset: Dataset, samples: int) -> Dataset:
    """Set `samples` training samples aside as the validation split.

    They are always the same samples of a data set. With 0 the data set is returned as it is.

    Raises:
        UserError: no training sample is left, or the data set has a validation split of its own.
    """
    if not samples:
        return dataset
    if dataset.validation is not None:
        raise UserError(
            f"data.validation = {samples}, but the data have a validation split of their own: "
            "leave it out"
        )
    number = len(dataset.train)
    if samples >= number:
        raise UserError(
            f"data.validation = {samples} leaves none of {number} training samples: set it lower"
        )
    order = np.random.Generator(np.random.Philox(VALIDATION_KEY)).permutation(number)
    validation = np.sort(order[:samples])
    training = np.sort(order[samples:])
    return replace(
        dataset,
        train=dataset.train.take(training),
        validation=dataset.train.take(validation),
        notes=dataset.notes + _note_on_transforms(dataset.train),
    )


def _note_on_transforms(split: Split) -> tuple[str, ...]:
    """Return a line where samples set aside are read as they are in training."""
    if not isinstance(split, Batches):
        return ()
    from swap_hpc.data.map_style import MapStyle

    source = split.function
    if not isinstance(source, MapStyle) or source.has_evaluated or source.has_no_transforms:
        return ()
    return (
        "the samples of data.validation are read with the training data set's transforms: where "
        "they are random, give Batches.of(..., evaluated=...) the same samples without them",
    )


def with_statistics(
    train: Arrays, test: Arrays, classes: tuple[str, ...], validation: Arrays | None = None
) -> Dataset:
    """Return a data set in memory that is normalised by its training images' mean and deviation."""
    counts = count_levels(train.images, range(len(train)))
    return normalised_by(counts, Dataset(train, test, classes, validation=validation))


def count_levels(images: np.ndarray, rows: range) -> np.ndarray:
    """Count how often each channel has each level in some rows of images (N, H, W, C) uint8.

    Returns:
        (C, 256) int64.
    """
    counts = np.zeros((images.shape[3], 256), np.int64)
    # np.bincount makes 8 bytes of each pixel: a thousand images at a time bound that memory
    for some in in_parts(rows):
        for channel, levels in enumerate(counts):
            levels += np.bincount(images[some, ..., channel].ravel(), minlength=256)
    return counts


def normalised_by(counts: np.ndarray, dataset: Dataset) -> Dataset:
    """Return a data set in memory with the size of its images, and the statistics of its levels.

    Args:
        counts: what `count_levels` returns for the images to take the mean and deviation of.
        dataset: its splits are `Arrays`.
    """
    assert isinstance(dataset.train, Arrays)
    _, height, width, channels = dataset.train.images.shape
    statistics = [_mean_and_deviation(levels) for levels in counts]
    return replace(
        dataset,
        image_size=(height, width),
        channels=channels,
        mean=tuple(mean for mean, _ in statistics),
        std=tuple(deviation for _, deviation in statistics),
    )


def _mean_and_deviation(counts: np.ndarray) -> tuple[float, float]:
    """Compute the two in float64 from the histogram of one channel, (256,) int64."""
    values = np.arange(256.0)
    mean = float(counts @ values / counts.sum())
    deviation = float(np.sqrt(counts @ (values - mean) ** 2 / counts.sum()))
    return mean, deviation or 1.0  # a channel of one value is not divided by 0
