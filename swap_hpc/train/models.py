"""Models by name, or by the import path of a user's function."""

import re
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
from swap_hpc.recipe.inputs import Model
from swap_hpc.recipe.wording import shortened
from swap_hpc.train.mismatch import mismatch
from swap_hpc.train.resnet9 import ResNet9

Builder = Callable[..., Any]


def build(model: Model, classes: int, channels: int, seed: int) -> nn.Module:
    """Build the model that a recipe names, on the CPU.

    `resnet9` and a user's function are called with `classes` and `channels`, torchvision's models
    with `num_classes`, timm's with `num_classes` and `in_chans`; all also get `model.arguments`.

    Args:
        model: Name and arguments.
        classes: Number of logits.
        channels: Channels of an image.
        seed: Seed of the initial weights.

    Returns:
        A module (n, channels, H, W) -> (n, classes) logits.

    Raises:
        UserError: The name is unknown, the builder refuses its arguments, or the result is not a
            module whose weights can be averaged.
    """
    seed_all(seed)
    builder, arguments = _builder(model, classes, channels)
    try:
        # Not merged into one dictionary, so that an argument given twice is an error.
        built = builder(**arguments, **model.arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model {model.name} refuses its arguments: {reason}") from None
    if not isinstance(built, nn.Module):
        raise UserError(
            f"the model {model.name} returned a {type(built).__name__}: a torch.nn.Module is needed"
        )
    _check_kind(built, model.name)
    _own_memory_(built)
    return built


def _builder(model: Model, classes: int, channels: int) -> tuple[Builder, dict[str, Any]]:
    """Return the function that builds a model, and the arguments that describe the data."""
    package, colon, name = model.name.partition(":")
    if model.name == "resnet9":
        return ResNet9, {"classes": classes, "channels": channels}
    if not colon:
        raise UserError(
            f'unknown model {model.name!r}: "resnet9", "torchvision:NAME", "timm:NAME" '
            'or "package.module:function"'
        )
    if package == "torchvision":
        return _torchvision(name), {"num_classes": classes}
    if package == "timm":
        return _timm(timm_name(model)), {"num_classes": classes, "in_chans": channels}
    own = {} if model.pretrained is None else {"pretrained": model.pretrained}
    builder = imported(model.name, "the model")
    return builder, {"classes": classes, "channels": channels, **own}


def timm_name(model: Model) -> str:
    """Return timm's name of a model, with the tag of the weights where `pretrained` names one.

    The tag is part of the name even where no weights are loaded: it may change the model.
    """
    name = model.name.removeprefix("timm:")
    return f"{name}.{model.pretrained}" if isinstance(model.pretrained, str) else name


def _torchvision(name: str) -> Builder:
    import torchvision

    if name not in torchvision.models.list_models(torchvision.models):
        raise UserError(
            f"torchvision has no classification model {name!r}; "
            "it has resnet18, resnet50, ... (torchvision.models.list_models())"
        )
    return torchvision.models.get_model_builder(name)


def _timm(name: str) -> Builder:
    try:
        import timm
    except ImportError:
        raise UserError(
            f"model timm:{name} needs timm, which is not installed: pip install timm"
        ) from None
    plain, _, tag = name.partition(".")
    if not timm.is_model(plain):
        raise UserError(f"timm has no model {plain!r}; timm.list_models() lists them")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        there = ", ".join(each.partition(".")[2] for each in timm.list_pretrained(f"{plain}.*"))
        raise UserError(
            f"timm has no weights {tag!r} of {plain}; it has {there or 'none'}"
        ) from None
    return partial(timm.create_model, name)


def _check_kind(model: nn.Module, name: str) -> None:
    """Raise UserError for a module whose weights are hidden or cannot be averaged."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(
                f"the model {name} is TorchScript ({path or 'all of it'}), "
                "which hides its layers: build the plain module"
            )
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise UserError(
                f"{path} of the model {name} is lazy, without a shape yet: "
                "call the model once on an image in its builder"
            )
        if tensor.is_meta:
            raise UserError(
                f"{path} of the model {name} is on the meta device: dense tensors are needed"
            )
        if tensor.layout is not torch.strided:
            layout = str(tensor.layout).removeprefix("torch.")
            raise UserError(
                f"{path} of the model {name} is of layout {layout}: dense tensors are needed"
            )


def _own_memory_(model: nn.Module) -> None:
    """Give each buffer that `expand()` made memory for all of its elements.

    torch refuses to copy into a tensor whose elements share memory, as loading weights does.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.numel() and not is_dense(buffer):
                module._buffers[name] = buffer.contiguous()


def size(model: Model, classes: int, channels: int, pixels: int) -> tuple[int, int]:
    """Return the cost of a model.

    Args:
        model: Name and arguments.
        classes: Number of logits.
        channels: Channels of an image.
        pixels: Side of a square image.

    Returns:
        The number of parameters, and the floating-point operations of a forward pass of one image.

    Raises:
        UserError: The model does not accept such an image.
    """
    # Imported here because only `swap-hpc plan` needs it.
    from torch.utils.flop_counter import FlopCounterMode

    built = build(model, classes, channels, 0).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            built(torch.zeros(1, channels, pixels, pixels))
        except Exception as error:  # a user's module may raise anything
            reason = " ".join(str(error).split())
            raise UserError(
                f"model {model.name} does not accept an image of {channels} channels and "
                f"{pixels}x{pixels} pixels ({reason}): --set data.image_size=N"
            ) from None
    parameters = sum(p.numel() for p in built.parameters())
    return parameters, counter.get_total_flops()


def fill_(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict, as `state_of` returns it, into a model.

    Args:
        model: Changed in place.
        state: Name -> tensor. The second name of tied weights may be missing, as it is in files
            of safetensors' `save_model`.
        source: The origin of the weights, for messages: "runs/x/swap.safetensors".

    Raises:
        UserError: The state dict does not fit the model; the message names what differs.
    """
    try:
        whole = {name: decoded(value) if is_extra(name) else value for name, value in state.items()}
        model.load_state_dict(with_tied(model, whole))
    except Exception as error:  # a user's `set_extra_state` may raise anything
        why = _why(error, model, state)
        raise UserError(f"the weights {source} do not fit this model: {why}") from None


def _why(error: Exception, model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Return why torch refused a state dict."""
    names = ""
    if re.search(r"size mismatch for |(Missing|Unexpected) key", str(error)):
        names = str(mismatch(model, with_tied(model, state)))
    return names or shortened(str(error), 300)


def with_tied(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state dict with the missing names of tied tensors filled in."""
    own = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor) and t.numel()}
    given = {_place(tensor): name for name, tensor in own.items() if name in state}
    whole = dict(state)
    for name, tensor in own.items():
        if name not in state and _place(tensor) in given:
            whole[name] = state[given[_place(tensor)]]
    return whole


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Return a key that two tensors share if they are the same view of the same memory."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
