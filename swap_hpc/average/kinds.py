"""What each tensor of a model is to SWAP: what is averaged, what is estimated anew, and what stays one group's.

Parameters and running means are averaged; other buffers and extra states are the first group's, of
which batch norm's statistics and the vectors of power iterations are then estimated anew. The
README's section on guarantees has the table.

Layers that keep their statistics while the model trains (frozen batch norm) keep them everywhere.
"""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from swap_hpc.parallel.tensors import has_numbers


def batchnorm_layers(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Name and module of the batch-norm layers that keep running statistics."""
    return [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None
    ]


def averaged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of what is averaged: the parameters, and running means of layers other than batch norm.

    The tensors are the model's own, also where its state dict hands out copies. Tied weights appear once.
    """
    return dict(model.named_parameters()) | {
        name: b for name, b in state_buffers(model).items() if is_running(model, name)
    }


def kept_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of the buffers that are not averaged: the first group's stay, or batch norm is estimated anew."""
    return {name: b for name, b in state_buffers(model).items() if not is_running(model, name)}


def state_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of the buffers that belong to a model's state: the persistent ones."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        passing = getattr(module, "_non_persistent_buffers_set", ())
        for name, buffer in module.named_buffers(recurse=False):
            if name not in passing and id(buffer) not in seen:
                seen.add(id(buffer))
                found[_join(prefix, name)] = buffer
    return found


def is_running(model: nn.Module, name: str) -> bool:
    """Tell whether a buffer is a running mean of a layer other than batch norm, by its name, as torch's layers have it."""
    prefix, _, last = name.rpartition(".")
    layer = model.get_submodule(prefix)
    return (
        last.startswith("running_")
        and not isinstance(layer, _BatchNorm)
        and has_numbers(layer.get_buffer(last))
    )


def team_means(model: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer of which a team's ranks, each having seen its share of the batches, take the mean.

    Running statistics of the layers that are in training mode now.
    """
    means = {}
    for prefix, module in model.named_modules():
        for last, buffer in module.named_buffers(recurse=False):
            if module.training and has_numbers(buffer) and last.startswith("running_"):
                means[_join(prefix, last)] = buffer
    return means


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
