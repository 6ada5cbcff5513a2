"""Foreign state dicts, fitted to a model: prefixes of other programs, and names to leave out."""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from swap_hpc.average.state import is_extra, state_of
from swap_hpc.errors import UserError
from swap_hpc.recipe.wording import count, first_few
from swap_hpc.run.weights import Tensors
from swap_hpc.train.mismatch import mismatch
from swap_hpc.train.models import fill_, with_tied

COMPILED = "_orig_mod."  # what torch.compile puts before a module's names, at any place
AVERAGES = "n_averaged"  # the counter of torch.optim.swa_utils.AveragedModel


def load_foreign_(
    model: nn.Module, tensors: Tensors, source: str, except_for: Sequence[str] = ()
) -> list[str]:
    """Load a state dict of any program into a model.

    Names lose what wrappers put before them: `_orig_mod.` of torch.compile at any place, and the
    prefix without which the most names are the model's, such as `module.` or `model.`. A tensor of
    another floating-point type is converted.

    Args:
        model: changed in place.
        tensors: see `StateDict.tensors`.
        source: the origin of the weights, for messages.
        except_for: patterns of names, as in "head.*": such tensors of the model stay as they are,
            and such tensors of the state dict are left out. A name is meant without its prefix.

    Returns:
        Lines that tell a person what was changed and left out.

    Raises:
        UserError: the state dict does not fit the model, or a pattern matches no name.
    """
    own = state_of(model)
    state, notes = _without_wrappers(tensors, own)
    state, left_out = _without_patterns(state, own, except_for, source)
    notes += left_out + _conversions(state, own, source)
    try:
        fill_(model, state, source)
    except UserError as error:
        patterns = mismatch(model, with_tied(model, state)).patterns
        if not 0 < len(patterns) <= 3:
            raise
        quoted = ", ".join(f'"{pattern}"' for pattern in patterns)
        raise UserError(
            f"{error}; --set 'model.weights_except=[{quoted}]' leaves that out: "
            "the model's own stay as initialised"
        ) from None
    return [f"{source}: {note}" for note in notes]


def _without_wrappers(tensors: Tensors, own: Tensors) -> tuple[Tensors, list[str]]:
    """Return a state dict without what wrappers put before its names, and notes of it."""
    notes = []
    state = {name.replace(COMPILED, ""): tensor for name, tensor in tensors.items()}
    if any(COMPILED in name for name in tensors) and not any(COMPILED in name for name in own):
        notes.append(f"{COMPILED} removed from names")
    else:
        state = dict(tensors)
    prefix = common_prefix(state, own)
    if not prefix:
        return state, notes
    notes.append(f"the prefix {prefix} removed from names")
    if prefix == "module." and AVERAGES in state:
        del state[AVERAGES]
        notes.append(f"the counter {AVERAGES} left out")
    without = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    if len(without) < len(state):
        raise UserError(f"names with and without the prefix {prefix} in one state dict")
    return without, notes


def common_prefix(names: Collection[str], wanted: Collection[str]) -> str:
    """Return the prefix without which the most names are wanted ones; "" where none helps."""
    known, hits = set(wanted), Counter({"": 0})
    for name in names:
        # the ends of all prefixes, "" included
        ends = (0, *(dot.end() for dot in re.finditer(r"\.", name)))
        hits.update(name[:end] for end in ends if name[end:] in known)
    return max(hits, key=lambda prefix: (hits[prefix], -len(prefix)))


def _without_patterns(
    state: Tensors, own: Tensors, patterns: Sequence[str], source: str
) -> tuple[Tensors, list[str]]:
    """Return a state dict whose names that match a pattern are the model's own, and notes of it."""
    names = [*dict.fromkeys([*own, *state])]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"model.weights_except: {pattern!r} matches no name, "
                f"neither of {source} nor of the model: {first_few(names)}"
            )
    matched = [name for name in names if any(fnmatchcase(name, p) for p in patterns)]
    kept = {name: own[name] for name in matched if name in own}
    ignored = [name for name in matched if name not in own]
    notes = []
    if kept:
        notes.append(f"{first_few([*kept], 5)} not loaded, left as initialised")
    if ignored:
        notes.append(f"{first_few(ignored, 5)} not used")
    return {name: t for name, t in state.items() if name not in matched} | kept, notes


def _conversions(state: Tensors, own: Tensors, source: str) -> list[str]:
    """Return notes of tensors that become another floating-point type.

    Raises:
        UserError: a tensor is of another kind, such as integers where the model has fractions.
    """
    changed: Counter[tuple[torch.dtype, torch.dtype]] = Counter()
    for name, tensor in state.items():
        wanted = own.get(name)
        if wanted is None or is_extra(name) or tensor.dtype == wanted.dtype:
            continue
        if _kind(tensor) != _kind(wanted):
            raise UserError(
                f"{name} of {source} is {_type(tensor.dtype)}, "
                f"where the model has {_type(wanted.dtype)}"
            )
        changed[tensor.dtype, wanted.dtype] += 1
    return [
        f"{count(number, 'tensor')} of type {_type(given)} converted to the model's {_type(wanted)}"
        for (given, wanted), number in changed.items()
    ]


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype is torch.bool


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
