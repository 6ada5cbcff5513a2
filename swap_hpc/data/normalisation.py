"""The mean and the deviation that images are normalised by."""

from dataclasses import replace

from swap_hpc.data.dataset import Dataset
from swap_hpc.data.splits import Arrays, Batches
from swap_hpc.errors import UserError
from swap_hpc.recipe.inputs import Data

# Per channel, of pixels in [0, 255]: what torchvision's ImageNet models are normalised by.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


def with_normalisation(dataset: Dataset, data: Data) -> Dataset:
    """Return a data set of images with the mean and the deviation that a recipe states, if any.

    Raises:
        UserError: there is not one number for each channel.
    """
    if isinstance(dataset.train, Batches):
        return dataset
    mean = _given("data.mean", data.mean, IMAGENET_MEAN, dataset.channels)
    std = _given("data.std", data.std, IMAGENET_STD, dataset.channels)
    return replace(dataset, mean=mean or dataset.mean, std=std or dataset.std)


def _given(
    name: str, value: tuple[float, ...] | str | None, imagenet: tuple[float, ...], channels: int
) -> tuple[float, ...]:
    """Return what a recipe states for pixels in [0, 255]; empty where it states nothing."""
    if value is None:
        return ()
    found = imagenet if isinstance(value, str) else tuple(255 * each for each in value)
    if len(found) != channels:
        raise UserError(
            f"{name} has {len(found)} numbers, but the images have {channels} channels: "
            "give one for each"
        )
    return found


def normalisation_line(dataset: Dataset, data: Data) -> list[str]:
    """Return a line that says whose mean and deviation are used; none for other than images."""
    if isinstance(dataset.train, Batches):
        return []
    in_memory = isinstance(dataset.train, Arrays)
    default = "the training images'" if in_memory and ":" not in data.name else "the data set's"
    mean = _owner(data.mean, dataset.mean == IMAGENET_MEAN, default)
    std = _owner(data.std, dataset.std == IMAGENET_STD, default)
    both = f"{mean} mean and standard deviation"
    return [
        "images are normalised by "
        + (both if mean == std else f"{mean} mean and {std} standard deviation")
    ]


def _owner(value: tuple[float, ...] | str | None, is_imagenet: bool, default: str) -> str:
    if value is None:
        return "ImageNet's" if is_imagenet else default
    return "ImageNet's" if value == "imagenet" else "the recipe's"
