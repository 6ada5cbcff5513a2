"""A name, or `package.module:function`, to a torch module."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from swap_hpc.average.state import decoded, is_extra
from swap_hpc.data.seeding import seed_all
from swap_hpc.errors import UserError
from swap_hpc.parallel.tensors import is_dense
from swap_hpc.recipe.imports import imported
from swap_hpc.recipe.schema import Model
from swap_hpc.train.resnet9 import ResNet9


def build(model: Model, classes: int, channels: int, seed: int) -> nn.Module:
    """The module that a recipe names, (n, channels, H, W) -> (n, classes) logits, initialised from `seed`, on the CPU.

    `resnet9` and functions of a user's own get `classes` and `channels`, torchvision's get `num_classes`, timm's `in_chans`,
    too; all get the recipe's further keys. Raises UserError for a name that does not exist and for arguments that the builder refuses.
    """
    seed_all(seed)
    package, colon, name = model.name.partition(":")
    builder: Callable[..., Any]
    if model.name == "resnet9":
        builder, arguments = ResNet9, {"classes": classes, "channels": channels}
    elif package == "torchvision" and colon:
        builder, arguments = _torchvision(name), {"num_classes": classes}
    elif package == "timm" and colon:
        builder, arguments = _timm(name), {"num_classes": classes, "in_chans": channels}
    elif colon:
        builder, arguments = (
            imported(model.name, "the model"),
            {"classes": classes, "channels": channels},
        )
    else:
        raise UserError(
            f'unknown model {model.name!r}: "resnet9", "torchvision:NAME", "timm:NAME" or "package.module:function"'
        )
    try:
        built = builder(**arguments, **model.arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"model {model.name} refuses its arguments: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(built, nn.Module):
        raise UserError(
            f"the model {model.name} returned a {type(built).__name__}: a torch.nn.Module is needed"
        )
    _check_kind(built, model.name)
    _own_memory_(built)
    return built


def _check_kind(model: nn.Module, name: str) -> None:
    """Raises UserError for modules whose weights cannot be averaged, or not be seen."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(
                f"the model {name} is TorchScript ({path or 'all of it'}), whose layers cannot be seen: build the plain module"
            )
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise UserError(
                f"{path} of the model {name} is lazy, without a shape yet: call the model once on an image in its builder"
            )
        if tensor.layout is not torch.strided or tensor.is_meta:
            kind = (
                "on the meta device"
                if tensor.is_meta
                else f"of layout {str(tensor.layout).removeprefix('torch.')}"
            )
            raise UserError(f"{path} of the model {name} is {kind}: dense tensors are needed")


def _own_memory_(model: nn.Module) -> None:
    """Gives each buffer that was made by `expand()` memory for all of its elements: such a tensor cannot be loaded."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.numel() and not is_dense(buffer):
                module._buffers[name] = buffer.contiguous()


def size(model: Model, classes: int, channels: int, pixels: int) -> tuple[int, int]:
    """Parameters of the module that a recipe names, and floating-point operations of its forward pass of one square image.

    Raises UserError where it does not take such an image.
    """
    from torch.utils.flop_counter import FlopCounterMode

    built = build(model, classes, channels, 0).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            built(torch.zeros(1, channels, pixels, pixels))
        except Exception as error:  # whatever a user's module raises
            said = " ".join(str(error).split())
            raise UserError(
                f"model {model.name} takes no image of {channels} channels and {pixels}x{pixels} pixels ({said}): --set data.image_size=N"
            ) from None
    return sum(p.numel() for p in built.parameters()), counter.get_total_flops()


def fill_(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Gives `model` a state dict as `state_of` returns it, read from `source`.

    The second name of tied weights may be missing, as in files of safetensors' `save_model`. Raises UserError where
    the state dict does not fit.
    """
    try:
        whole = {name: decoded(value) if is_extra(name) else value for name, value in state.items()}
        model.load_state_dict(_with_tied(model, whole))
    except Exception as error:  # whatever a user's `set_extra_state` raises
        raise UserError(
            f"the weights {source} are not of this model: {' '.join(str(error).split())[:300]}"
        ) from None


def _with_tied(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The state dict, each missing name of a tensor that it has under another name filled in."""
    own = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor) and t.numel()}
    known = {_place(tensor): name for name, tensor in own.items() if name in state}
    missing = {
        name: known[_place(t)]
        for name, t in own.items()
        if name not in state and _place(t) in known
    }
    return state | {name: state[other] for name, other in missing.items()}


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _torchvision(name: str) -> Any:
    import torchvision

    if name not in torchvision.models.list_models(torchvision.models):
        raise UserError(
            f"torchvision has no classification model {name!r}; it has resnet18, resnet50, ... (torchvision.models.list_models())"
        )
    return torchvision.models.get_model_builder(name)


def _timm(name: str) -> Any:
    try:
        import timm
    except ImportError:
        raise UserError(
            f"model timm:{name} needs timm, which is not installed: pip install timm"
        ) from None
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}; timm.list_models() lists them")
    return partial(timm.create_model, name)
