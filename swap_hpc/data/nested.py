"""Tensors in nested tuples, lists and dictionaries, as a user's batches and models hold them."""

from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from typing import Any

from torch import Tensor


def mapped(function: Callable[[Tensor], Any], nest: Any) -> Any:
    """Return a nest with each tensor replaced by what `function` makes of it.

    Its dictionaries, lists and tuples become others of their types; other mappings, such as a
    `UserDict`, become dictionaries; what is no tensor stays.
    """
    if isinstance(nest, Tensor):
        return function(nest)
    if isinstance(nest, Mapping):
        named = {name: mapped(function, each) for name, each in nest.items()}
        # A subclass, such as transformers' ModelOutput, may offer its keys as attributes, too.
        is_subclass = isinstance(nest, dict) and type(nest) is not dict
        are_words = all(isinstance(name, str) for name in named)
        return type(nest)(**named) if is_subclass and are_words else named
    if isinstance(nest, tuple | list):
        parts = [mapped(function, each) for each in nest]
        is_named_tuple = hasattr(nest, "_fields")
        return type(nest)(*parts) if is_named_tuple else type(nest)(parts)
    return nest


def leaves(nest: Any) -> Iterator[Any]:
    """Yield all that lies in the dictionaries, lists and tuples of a nest, in their order."""
    if isinstance(nest, Mapping):
        nest = list(nest.values())
    if isinstance(nest, tuple | list):
        for each in nest:
            yield from leaves(each)
    else:
        yield nest


def first_tensor(nest: Any) -> Tensor:
    """Return the first tensor of a nest, which holds at least one."""
    return next(leaf for leaf in leaves(nest) if isinstance(leaf, Tensor))


def cut(nest: Any, parts: int) -> Iterator[Any]:
    """Yield `parts` nests, each with an equal part of all tensors, cut along the samples.

    Args:
        nest: its tensors are (n, ...) each.
        parts: a divisor of n.
    """
    size = len(first_tensor(nest)) // parts
    for first in range(0, size * parts, size):
        yield mapped(itemgetter(slice(first, first + size)), nest)
