"""Data sets made by a user's own function, which a recipe names by its import path."""

from inspect import signature
from typing import Any

from swap_hpc.data.custom_arrays import ANYTHING_ELSE, check_shapes, checked_pair
from swap_hpc.data.custom_dataset import completed
from swap_hpc.data.dataset import Dataset, with_statistics
from swap_hpc.errors import UserError
from swap_hpc.recipe.imports import imported, in_one_line
from swap_hpc.recipe.inputs import Data


def load_custom(data: Data) -> Dataset:
    """Call the function that a recipe names, and check what it returns.

    The function takes `data.path` and `data.arguments`. It returns a `Dataset`, or arrays:
    `((images, labels), (test images, test labels))`, images (N, H, W, C) uint8, labels (N,)
    integers from 0. Of three pairs, the second is the validation split.

    Raises:
        UserError: the function does not take these arguments, or returns anything else.
    """
    function = imported(data.name, "the data")
    try:
        signature(function).bind(data.path, **data.arguments)
    except TypeError as error:
        raise UserError(
            f"the data {data.name} cannot be called with data.path and data.arguments: {error}"
        ) from None
    with in_one_line(f"the data {data.name} failed"):
        found = function(data.path, **data.arguments)
    if isinstance(found, Dataset):
        return completed(found, data)
    return _from_arrays(data.name, found)


def _from_arrays(name: str, found: Any) -> Dataset:
    try:
        pairs = [(images, labels) for images, labels in found]
        first, *between, last = pairs
        validation = between[0] if between else None
        if len(between) > 1:
            raise ValueError("too many pairs")
    except (TypeError, ValueError):
        raise UserError(
            f"the data {name} returned a {type(found).__name__}: a Dataset, or ((images, labels), "
            f"(test images, test labels)), is needed; {ANYTHING_ELSE}"
        ) from None
    train, test = checked_pair(name, *first), checked_pair(name, *last)
    others = {"test": test}
    if validation:
        others["validation"] = checked_pair(name, *validation)
    check_shapes(name, train, others.items())
    classes = 1 + int(max(each.labels.max() for each in (train, *others.values())))
    names = tuple(map(str, range(classes)))
    return with_statistics(train, test, names, others.get("validation"))
