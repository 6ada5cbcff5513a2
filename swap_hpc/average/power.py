"""Vectors of power iterations, as spectral norm keeps them, iterated for the present weights.

Spectral norm divides a weight by its norm, which it derives from singular vectors in buffers. A
mean of two groups' vectors is not a singular vector, and one group's vectors are not the average's:
the norm would be wrong by any factor. Both of torch's styles are known, and a user's own
parametrizations that keep unit vectors and update them while they train.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from swap_hpc.average.modes import restored_modes
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import assign_, from_bytes, has_numbers, tensor_bytes

ROUNDS = 300  # at most, per module

# The vectors have settled when no element changes by more in a round. The norm's error is of the
# order of the square of that.
SETTLED = 1e-5


@torch.no_grad()
def iterate_power_methods_(model: nn.Module, training: set[nn.Module], team: Team) -> None:
    """Iterate the vectors of power methods until they settle. Collective.

    Args:
        model: changed in place.
        training: the modules that train; those of others stay as they are.
        team: its ranks end with the same vectors.
    """
    for iterate, vectors in _power_methods(model, training):
        _settle(iterate, vectors)
        if team.size > 1:
            # Ranks have the same weights, but processors of another kind may round differently.
            for vector in vectors:
                first = team.broadcast_(tensor_bytes(vector).copy())
                assign_(vector, from_bytes(torch.from_numpy(first), vector.dtype, vector.shape))


def _settle(iterate: Callable[[], object], vectors: list[Tensor]) -> None:
    for _ in range(ROUNDS):
        before = [vector.clone() for vector in vectors]
        # Under autocast, products in bfloat16 would never settle.
        with torch.autocast(vectors[0].device.type, enabled=False):
            iterate()
        pairs = zip(before, vectors, strict=True)
        if all(torch.allclose(old, new, rtol=0, atol=SETTLED) for old, new in pairs):
            break


def _power_methods(
    model: nn.Module, training: set[nn.Module]
) -> Iterator[tuple[Callable[[], object], list[Tensor]]]:
    """Yield for each power method a function that iterates once, and the vectors it changes."""
    for module in model.modules():
        if module not in training:
            continue
        if isinstance(module, ParametrizationList):
            buffers = [buffer for buffer in module.buffers() if has_numbers(buffer)]
            if buffers and _iterates(module, buffers):
                yield _forward_in_training(module), buffers
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                vectors = [module.get_buffer(f"{hook.name}_u"), module.get_buffer(f"{hook.name}_v")]
                yield _old_style(hook, module), vectors


def _iterates(module: ParametrizationList, buffers: list[Tensor]) -> bool:
    """Tell whether a forward pass in training changes unit vectors into other unit vectors.

    That is taken for a power iteration. The buffers are left as they were.
    """
    before = [buffer.clone() for buffer in buffers]
    _forward_in_training(module)()
    changed: list[Tensor] = []
    for old, new in zip(before, buffers, strict=True):
        if not torch.equal(old, new):
            changed += [old, new.clone()]
    for buffer, old in zip(buffers, before, strict=True):
        assign_(buffer, old)
    return bool(changed) and all(map(_is_unit, changed))


def _is_unit(vector: Tensor) -> bool:
    return vector.ndim == 1 and abs(float(vector.norm()) - 1) < 1e-2


def _forward_in_training(module: ParametrizationList) -> Callable[[], object]:
    """Return a function that computes the parametrized weight as in training."""

    def iterate() -> None:
        with restored_modes(module):
            module.train()
            module()

    return iterate


def _old_style(hook: SpectralNorm, module: nn.Module) -> Callable[[], object]:
    """Return a function that iterates the vectors of `torch.nn.utils.spectral_norm` once."""
    return lambda: hook.compute_weight(module, do_power_iteration=True)
