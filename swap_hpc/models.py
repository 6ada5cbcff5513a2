"""A name, or `package.module:function`, to a torch module."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from swap_hpc.errors import UserError
from swap_hpc.imports import imported
from swap_hpc.kinds import decoded, is_extra, restored_modes
from swap_hpc.recipe import Model
from swap_hpc.seeding import seed_all
from swap_hpc.tensors import is_dense


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
        builder, arguments = imported(model.name, "the model"), {"classes": classes, "channels": channels}
    else:
        raise UserError(f'unknown model {model.name!r}: "resnet9", "torchvision:NAME", "timm:NAME" or "package.module:function"')
    try:
        built = builder(**arguments, **model.arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"model {model.name} refuses its arguments: {' '.join(str(error).split())}") from None
    if not isinstance(built, nn.Module):
        raise UserError(f"the model {model.name} returned a {type(built).__name__}: a torch.nn.Module is needed")
    _check_kind(built, model.name)
    _own_memory_(built)
    return built


def _check_kind(model: nn.Module, name: str) -> None:
    """Raises UserError for modules whose weights cannot be averaged, or not be seen."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(f"the model {name} is TorchScript ({path or 'all of it'}), whose layers cannot be seen: build the plain module")
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise UserError(f"{path} of the model {name} is lazy, without a shape yet: call the model once on an image in its builder")
        if tensor.layout is not torch.strided or tensor.is_meta:
            kind = "on the meta device" if tensor.is_meta else f"of layout {str(tensor.layout).removeprefix('torch.')}"
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
        raise UserError(f"the weights {source} are not of this model: {' '.join(str(error).split())[:300]}") from None


def _with_tied(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The state dict, each missing name of a tensor that it has under another name filled in."""
    own = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor) and t.numel()}
    known = {_place(tensor): name for name, tensor in own.items() if name in state}
    missing = {name: known[_place(t)] for name, t in own.items() if name not in state and _place(t) in known}
    return state | {name: state[other] for name, other in missing.items()}


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode; afterwards every module has the mode again that it had, which need not be the model's."""
    with restored_modes(model):
        model.eval()
        yield


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
        raise UserError(f"model timm:{name} needs timm, which is not installed: pip install timm") from None
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}; timm.list_models() lists them")
    return partial(timm.create_model, name)


class ResNet9(nn.Module):
    """The ResNet-9 of D. Page, "How to train your ResNet" (cifar10-fast, 2018), for images of 8x8 and larger.

    `width`: channels of the first layer; the paper's network has 64. Sizes of 32x32 inputs are given below.
    """

    def __init__(self, classes: int, channels: int = 3, width: int = 64):
        super().__init__()
        if width < 1:
            raise ValueError(f"width = {width}, but it needs at least one channel")
        w = width
        self.prep = _convolution(channels, w)  # (n, w, 32, 32)
        self.layer1 = nn.Sequential(_convolution(w, 2 * w), nn.MaxPool2d(2), _Residual(2 * w))  # (n, 2w, 16, 16)
        self.layer2 = nn.Sequential(_convolution(2 * w, 4 * w), nn.MaxPool2d(2))  # (n, 4w, 8, 8)
        self.layer3 = nn.Sequential(_convolution(4 * w, 8 * w), nn.MaxPool2d(2), _Residual(8 * w))  # (n, 8w, 4, 4)
        self.linear = nn.Linear(8 * w, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.prep(x))))
        return self.linear(x.amax(dim=(2, 3))) * 0.125


def _convolution(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)
    )


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)
