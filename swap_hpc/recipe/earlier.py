"""Recipes as earlier versions resolved them."""

from collections.abc import Mapping
from typing import Any

# Earlier versions wrote all of these, and used the last two for files read in every epoch only.
LISTED = {"pad", "flip", "cutout", "crop_area", "crop_ratio"}
DEFAULTS = ([0.08, 1.0], [0.75, 4 / 3])
IN_MEMORY = ("digits", "cifar10", "cifar100", "synthetic")


def without_unused_crops(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a recipe without the random crops that an earlier version listed and did not use."""
    augment, data = fields.get("augment"), fields.get("data")
    if not isinstance(augment, Mapping) or not isinstance(data, Mapping):
        return fields
    crops = (augment.get("crop_area"), augment.get("crop_ratio"))
    was_in_memory = (
        data.get("name") in IN_MEMORY or augment.get("pad", 0) or augment.get("cutout", 0)
    )
    if augment.keys() != LISTED or crops != DEFAULTS or not was_in_memory:
        return fields
    used = {name: augment[name] for name in ("pad", "flip", "cutout")}
    return {**fields, "augment": used}


def name_metrics(fields: dict[str, Any]) -> None:
    """Give the one metric of an earlier recipe, `metric`, its name of today, in place."""
    if "metric" in fields and "metrics" not in fields:
        fields["metrics"] = fields.pop("metric")
