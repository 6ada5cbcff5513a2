"""The fields of a recipe that describe how training images are augmented."""

from typing import Any

from pydantic import NonNegativeFloat, model_validator

from swap_hpc.recipe.section import Section
from swap_hpc.recipe.values import CountOrZero, Fraction, Range

# Fields that only matter beside another one.
NEEDS = {
    "crop_ratio": ("crop_area",),
    "cutmix_share": ("mixup", "cutmix"),
}


class Augment(Section):
    """The augmentation of training images: the same for images in memory and for files read in
    every epoch, on a CPU and on a GPU. In this order:"""

    crop_area: Range | None = None
    """Random crop, resized to the image size: its smallest and largest area, as fractions of the
    image's area. None: the whole image in memory; of a file, the largest centre square."""
    crop_ratio: Range = (0.75, 4 / 3)
    """Smallest and largest aspect ratio of that crop, width / height."""
    pad: CountOrZero = 0
    """Pixels added on each side by reflection, before a random crop back to the image size."""
    flip: bool = False
    """Mirror each image horizontally with probability 1/2."""
    cutout: CountOrZero = 0
    """Side in pixels of a square at a random place, set to the mean (`data.mean`)."""

    mixup: NonNegativeFloat = 0.0
    """Mix pairs of images and their labels (arXiv 1710.09412): the alpha of the beta distribution
    that an image's share is drawn from; larger values mix more evenly, 0 not at all. Every rank's
    share of a batch must be even. Your own loss gets (n, classes) probabilities as targets."""
    cutmix: NonNegativeFloat = 0.0
    """Swap a box of pixels between pairs of images (arXiv 1905.04899), and mix their labels by its
    area: the alpha that the area is drawn with, as for `mixup`."""
    cutmix_share: Fraction = 0.5
    """Share of the pairs that are mixed by `cutmix` where both are set."""

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
