"""Vectors of power iterations, as spectral norm keeps them, brought to the weights as they are.

A mean of two groups' vectors is no singular vector, and one group's vectors are not the average's:
the norm that a layer divides by would be wrong by any factor. Both styles of torch are known, and
parametrizations of a user's own that keep unit vectors and update them while they train.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from swap_hpc.average.modes import restored_modes
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import assign_, from_bytes, has_numbers, tensor_bytes

ROUNDS = 300  # at most


SETTLED = (
    1e-5  # change of a vector's elements in a round; the norm's error is of the order of its square
)


@torch.no_grad()
def iterate_power_methods_(model: nn.Module, training: set[nn.Module], team: Team) -> None:
    """Iterates the vectors of the modules that are among `training` until they settle; alike on all ranks of `team`."""
    for iterate, vectors in _power_methods(model, training):
        for _ in range(ROUNDS):
            before = [vector.clone() for vector in vectors]
            with torch.autocast(
                vectors[0].device.type, enabled=False
            ):  # bfloat16 would never settle
                iterate()
            if all(
                torch.allclose(old, new, rtol=0, atol=SETTLED)
                for old, new in zip(before, vectors, strict=True)
            ):
                break
        if team.size > 1:  # processors of other kinds may round in another way
            for vector in vectors:
                first = team.broadcast_(tensor_bytes(vector).copy())
                assign_(vector, from_bytes(torch.from_numpy(first), vector.dtype, vector.shape))


def _power_methods(
    model: nn.Module, training: set[nn.Module]
) -> Iterator[tuple[Callable[[], object], list[Tensor]]]:
    """What iterates once, and the vectors that it changes."""
    for module in model.modules():
        if module not in training:
            continue
        if isinstance(module, ParametrizationList):
            vectors = [b for b in module.buffers() if has_numbers(b)]
            if vectors and _iterates(module, vectors):
                yield _forward_in_training(module), vectors
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                vectors = [module.get_buffer(f"{hook.name}_u"), module.get_buffer(f"{hook.name}_v")]
                yield _old_style(hook, module), vectors


def _iterates(module: ParametrizationList, buffers: list[Tensor]) -> bool:
    """Tell whether what a forward pass in training changes are unit vectors, and stay such. Leaves the buffers as they were."""
    before = [buffer.clone() for buffer in buffers]
    _forward_in_training(module)()
    changed = [
        (old, new.clone())
        for old, new in zip(before, buffers, strict=True)
        if not torch.equal(old, new)
    ]
    for buffer, old in zip(buffers, before, strict=True):
        assign_(buffer, old)
    return bool(changed) and all(map(_is_unit, (vector for pair in changed for vector in pair)))


def _is_unit(vector: Tensor) -> bool:
    return vector.ndim == 1 and abs(float(vector.norm()) - 1) < 1e-2


def _forward_in_training(module: ParametrizationList) -> Callable[[], object]:
    def iterate() -> None:
        with restored_modes(module):
            module.train()
            module()

    return iterate


def _old_style(hook: SpectralNorm, module: nn.Module) -> Callable[[], object]:
    return lambda: hook.compute_weight(module, do_power_iteration=True)
