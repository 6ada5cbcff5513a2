"""The fields of a recipe that describe how training images are augmented."""

from typing import Any

from pydantic import model_validator

from swap_hpc.recipe.section import Section
from swap_hpc.recipe.values import CountOrZero, Range

# Fields that only matter beside another one.
NEEDS = {"crop_ratio": "crop_area"}


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

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "Augment":
        if self.crop_area and self.pad:
            raise ValueError(
                "crop_area and pad are two ways to take a random crop: choose one of them"
            )
        for field, other in NEEDS.items():
            if not getattr(self, other) and getattr(self, field) != default_of(field):
                raise ValueError(f"{field} has no effect without {other}: set {other}, too")
        return self


def default_of(field: str) -> Any:
    """Return the default of a field of `[augment]`."""
    return Augment.model_fields[field].default
