"""The fields of a recipe that describe how training images are augmented."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, NonNegativeFloat, model_validator

from swap_hpc.recipe.section import Section
from swap_hpc.recipe.values import CountOrZero, Fraction, Range

JITTERS = ("brightness", "contrast", "saturation", "hue")

# Fields that only matter beside another one.
NEEDS = {
    "crop_ratio": ("crop_area",),
    "randaugment_magnitude": ("randaugment",),
    "erasing_area": ("erasing",),
    "erasing_ratio": ("erasing",),
    "cutmix_share": ("mixup", "cutmix"),
}


def _checked_area(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[1] > 1:
        raise ValueError("needs fractions of the image's area, up to 1")
    return pair


AreaRange = Annotated[Range, AfterValidator(_checked_area)]


class Augment(Section):
    """The augmentation of training images: the same for images in memory and for files read in
    every epoch, on a CPU and on a GPU. In this order:"""

    crop_area: AreaRange | None = None
    """Random crop, resized to the image size: its smallest and largest area, as fractions of the
    image's area. None: the whole image in memory; of a file, the largest centre square."""
    crop_ratio: Range = (0.75, 4 / 3)
    """Smallest and largest aspect ratio of that crop, width / height."""
    pad: CountOrZero = 0
    """Pixels added on each side by reflection, before a random crop back to the image size."""
    flip: bool = False
    """Mirror each image horizontally with probability 1/2."""
    randaugment: CountOrZero = 0
    """RandAugment (arXiv 1909.13719): operations applied to each image, of the 14 of torchvision's
    `RandAugment`. What they uncover is grey. 0: none."""
    randaugment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Strength of RandAugment's operations, from 0 to 30 as in torchvision; timm's `m9`, on a scale
    that ends at 10, is 27."""
    trivial_augment: bool = False
    """TrivialAugment (arXiv 2103.10158): one of these operations for each image, of a random and
    wider magnitude, as in torchvision's `TrivialAugmentWide`."""
    brightness: NonNegativeFloat = 0.0
    """Colour jitter, as torchvision's and timm's: multiplies the pixels by a random factor from 1 -
    `brightness` (at least 0) to 1 + `brightness`. All four are applied in a random order."""
    contrast: NonNegativeFloat = 0.0
    """Colour jitter: the same for the distance from the image's mean grey."""
    saturation: NonNegativeFloat = 0.0
    """Colour jitter: the same for the distance from each pixel's grey."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Colour jitter: turns the hue by up to this part of the circle of colours, either way."""
    cutout: CountOrZero = 0
    """Side in pixels of a square at a random place, set to the mean (`data.mean`)."""

    erasing: Fraction = 0.0
    """Random erasing (arXiv 1708.04896): probability that a box of the image is set to the mean."""
    erasing_area: AreaRange = (0.02, 0.33)
    """Smallest and largest area of that box, as fractions of the image's area."""
    erasing_ratio: Range = (0.3, 3.3)
    """Smallest and largest aspect ratio of that box, width / height."""
    mixup: NonNegativeFloat = 0.0
    """Mix pairs of images and their labels (arXiv 1710.09412): the alpha of the beta distribution
    that an image's share is drawn from; larger values mix more evenly, 0 not at all. Every rank's
    share of a batch must be even. In training, your own loss and metrics get (n, classes)
    probabilities as targets; accuracy compares with the larger one."""
    cutmix: NonNegativeFloat = 0.0
    """Swap a box of pixels between pairs of images (arXiv 1905.04899), and mix their labels by its
    area: the alpha that the area is drawn with, as for `mixup`."""
    cutmix_share: Fraction = 0.5
    """Share of the pairs that are mixed by `cutmix` where both are set."""

    @property
    def policy_rounds(self) -> int:
        """How many operations RandAugment or TrivialAugment applies to an image."""
        return 1 if self.trivial_augment else self.randaugment

    @property
    def jitters(self) -> tuple[str, ...]:
        """The operations of the colour jitter that are asked for."""
        return tuple(name for name in JITTERS if getattr(self, name))

    @property
    def operates(self) -> bool:
        """Whether there are operations on the pixels' colours and places."""
        return self.policy_rounds > 0 or bool(self.jitters)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def share_of_cutmix(self) -> float:
        """The share of the pairs that are mixed by CutMix."""
        if not (self.mixup and self.cutmix):
            return float(self.cutmix > 0)
        return self.cutmix_share

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "Augment":
        if self.crop_area and self.pad:
            raise ValueError(
                "crop_area and pad are two ways to take a random crop: choose one of them"
            )
        if self.randaugment and self.trivial_augment:
            raise ValueError("randaugment and trivial_augment exclude each other: choose one")
        for field, others in NEEDS.items():
            missing = [other for other in others if not getattr(self, other)]
            if missing and getattr(self, field) != default_of(field):
                raise ValueError(
                    f"{field} has no effect without {missing[0]}: set {missing[0]}, too"
                )
        return self


def default_of(field: str) -> Any:
    """Return the default of a field of `[augment]`."""
    return Augment.model_fields[field].default
