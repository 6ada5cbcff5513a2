"""What each tensor of a model is to SWAP: averaged, re-estimated, or kept from the first group.

Parameters and running means are averaged. Other buffers and extra states are the first group's;
batch norm's statistics and the vectors of power iterations among them are then estimated again for
the average. "What is averaged" in swap_hpc/README.md has the table.

Layers that keep their statistics while the model trains (frozen batch norm) keep them everywhere.
"""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from swap_hpc.parallel.tensors import has_numbers


def batchnorm_layers(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Return the names and modules of the batch-norm layers that keep running statistics."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


def averaged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> tensor of the parameters, and running statistics outside batch norm.

    The tensors are the model's own, even if its state dict hands out copies. Tied weights appear
    once.
    """
    means = {name: t for name, t in state_buffers(model).items() if is_running(model, name)}
    return dict(model.named_parameters()) | means


def kept_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> tensor of the buffers that are not averaged.

    The first group's stay, or they are estimated again.
    """
    return {name: t for name, t in state_buffers(model).items() if not is_running(model, name)}


def state_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> tensor of the persistent buffers: those that belong to a model's state."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()  # a module or a buffer may appear under several names
    for prefix, module in model.named_modules():
        non_persistent = getattr(module, "_non_persistent_buffers_set", ())
        for name, buffer in module.named_buffers(recurse=False):
            if name not in non_persistent and id(buffer) not in seen:
                seen.add(id(buffer))
                found[qualified(prefix, name)] = buffer
    return found


def is_running(model: nn.Module, name: str) -> bool:
    """Tell whether a buffer is a running statistic of another layer than batch norm.

    Its name begins with `running_`, as those of torch's layers do.

    Args:
        model: the model.
        name: the buffer's name in it.
    """
    prefix, _, last = name.rpartition(".")
    layer = model.get_submodule(prefix)
    return (
        last.startswith("running_")
        and not isinstance(layer, _BatchNorm)
        and has_numbers(layer.get_buffer(last))
    )


def team_means(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> buffer of the running statistics of layers that are in training mode now.

    Each rank of a team has seen its share of the batches: together they take the mean.
    """
    means = {}
    for prefix, module in model.named_modules():
        for last, buffer in module.named_buffers(recurse=False):
            if module.training and has_numbers(buffer) and last.startswith("running_"):
                means[qualified(prefix, last)] = buffer
    return means


def qualified(prefix: str, name: str) -> str:
    """Return a tensor's name in a model, given its module's name, which is empty for the model."""
    return f"{prefix}.{name}" if prefix else name
