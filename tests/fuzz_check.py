"""Check the files of a SWAP run with plain torch, without the package's code.

how swap.safetensors follows from the groups    which tensors
the mean, in float64, rounded once              parameters; `running_` buffers of other layers
estimated anew on the training samples          batch norm that is in training mode in training
iterated anew on the averaged weights           vectors of power iterations
the first group's, bit for bit                  all other buffers, and extra state
the builder's, bit for bit, in every file       frozen batch norm and parameters, held entries
"""

import io
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, TypeAlias

import fuzz_models
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

GROUPS = 2
EXTRA = "_extra_state"

Kind: TypeAlias = Literal["mean", "refreshed", "iterated", "first", "builder's"]
State: TypeAlias = dict[str, Tensor]  # by name; extra state as the bytes of torch.save


def wrong_in(folder: Path, model: nn.Module, accuracy: float) -> list[str]:
    """Return what in a run's folder differs from what it has to hold.

    Args:
        folder: the run's folder.
        model: as the builder made it.
        accuracy: of the averaged model, as the run reports it.
    """
    initial = {name: tensor.clone() for name, tensor in _tensors(model).items()}
    groups = [load_file(folder / f"group-{group:03d}.safetensors") for group in range(GROUPS)]
    swap = load_file(folder / "swap.safetensors")
    names = set(initial) | {name for name in model.state_dict() if name.endswith(EXTRA)}
    for state in (*groups, swap):
        if set(state) != names:
            return [f"other names: {sorted(set(state) ^ names)}"]
        if odd := [name for name in initial if not _alike(state[name], initial[name])]:
            return [f"other types or shapes: {odd}"]
    kinds = kinds_of(model)
    return [
        *_wrong_tensors(kinds, initial, groups, swap),
        *_wrong_extra_state(groups, swap),
        *_wrong_held(model, initial, [*groups, swap]),
        *_wrong_ties(model, [*groups, swap]),
        *_wrong_norms(model, swap),
        *_wrong_statistics(model, initial, swap, kinds),
        *_wrong_accuracy(model, swap, accuracy),
    ]


def kinds_of(model: nn.Module) -> dict[str, Kind]:
    """Return how the average of each tensor of the state dict is made."""
    model.train()
    kinds: dict[str, Kind] = dict.fromkeys(_tensors(model), "first")
    for name, parameter in model.named_parameters(remove_duplicate=False):
        kinds[name] = "mean" if parameter.requires_grad else "builder's"
    for name, module in model.named_modules():
        for buffer, _ in module.named_buffers(recurse=False):
            path = f"{name}.{buffer}".lstrip(".")
            if path in kinds:  # a buffer that is not persistent is not
                kinds[path] = _kind_of_buffer(module, buffer)
    return kinds


def _kind_of_buffer(module: nn.Module, buffer: str) -> Kind:
    if isinstance(module, _BatchNorm):
        return "refreshed" if module.training else "builder's"
    vectors = {f"{hook.name}_{side}" for hook in _old_spectral_norms(module) for side in "uv"}
    if isinstance(module, _SpectralNorm | fuzz_models.OwnPowerIteration) or buffer in vectors:
        return "iterated"
    floating = module.get_buffer(buffer).is_floating_point()
    return "mean" if buffer.startswith("running_") and floating else "first"


def _old_spectral_norms(module: nn.Module) -> list[SpectralNorm]:
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, SpectralNorm)]


def _wrong_tensors(
    kinds: dict[str, Kind],
    initial: State,
    groups: list[State],
    swap: State,
) -> Iterator[str]:
    for name, kind in kinds.items():
        first, *others = (group[name] for group in groups)
        if kind == "mean" and not same(swap[name], mean([first, *others])):
            yield f"{name} is not the groups' mean, but {_place(swap[name], first, *others)}"
        if kind == "first" and not same(swap[name], first):
            yield f"{name} is not the first group's, but {_place(swap[name], first, *others)}"
        if kind == "builder's":
            files = {"group-000": first, "group-001": others[0], "swap": swap[name]}
            for file, tensor in files.items():
                if not same(tensor, initial[name]):
                    yield f"{name} of {file} is not the builder's"


def _wrong_extra_state(groups: list[State], swap: State) -> Iterator[str]:
    for name in (name for name in swap if name.endswith(EXTRA)):
        found, first = _extra(swap[name]), _extra(groups[0][name])
        if found != first:
            yield f"{name} is {found}, the first group's is {first}"


def _wrong_held(model: nn.Module, initial: State, files: list[State]) -> Iterator[str]:
    for path, module in model.named_modules():
        if not isinstance(module, fuzz_models.GradientMask):
            continue
        name = f"{path}.linear.weight"
        for file in files:
            if not same(file[name][module.held], initial[name][module.held]):
                yield f"{name}: a gradient hook holds entries that moved"
        trained = module.linear.weight.requires_grad
        if trained and same(files[0][name], files[1][name]):
            yield f"{name}: no hook holds entries that did not move"


def _wrong_ties(model: nn.Module, files: list[State]) -> Iterator[str]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for first, *others in names.values():
        for other in others:
            if any(not same(file[first], file[other]) for file in files):
                yield f"{other} is no longer {first}"


def _wrong_norms(model: nn.Module, swap: State) -> Iterator[str]:
    """Compare the norms that the model divides by in evaluation with those of the averages."""
    for path, module in model.named_modules():
        for hook in _old_spectral_norms(module):
            names = [f"{path}.{hook.name}_{part}" for part in ("orig", "u", "v")]
            weight, u, v = (swap[name].double() for name in names)
            yield from _wrong_norm(path, weight.flatten(1), u @ weight.flatten(1) @ v)
        original = f"{path.rpartition('.')[0]}.original"
        if isinstance(module, _SpectralNorm):
            weight, u, v = (swap[name].double() for name in (original, f"{path}._u", f"{path}._v"))
            yield from _wrong_norm(path, weight.flatten(1), u @ weight.flatten(1) @ v)
        if isinstance(module, fuzz_models.OwnPowerIteration):
            weight, left = swap[original].double(), swap[f"{path}.left"].double()
            yield from _wrong_norm(path, weight, (weight.T @ left).norm())


def _wrong_norm(path: str, weight: Tensor, used: Tensor) -> Iterator[str]:
    true = torch.linalg.matrix_norm(weight, 2)
    if not abs(used / true - 1) < 0.01:
        yield f"{path}: divides by {used:.5f}, the averaged weight's norm is {true:.5f}"


def _wrong_statistics(
    model: nn.Module,
    initial: State,
    swap: State,
    kinds: dict[str, Kind],
) -> Iterator[str]:
    """Compare batch norm's statistics with those of one batch of all training samples.

    All other layers are in evaluation mode.
    """
    averaged = filled(model, swap).eval()
    seen: dict[str, list[Tensor]] = {}
    for path, layer in averaged.named_modules():
        if kinds.get(f"{path}.running_mean") == "refreshed":
            layer.train()
            inputs = seen.setdefault(path, [])
            layer.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
    with torch.no_grad():
        averaged(fuzz_models.images(train=True)[0])
    for path, inputs in seen.items():
        yield from _wrong_layer(path, inputs, initial, swap)


def _wrong_layer(path: str, inputs: list[Tensor], initial: State, swap: State) -> Iterator[str]:
    found = {part: swap[f"{path}.{part}"] for part in ("running_mean", "running_var")}
    batches = int(swap[f"{path}.num_batches_tracked"])
    if batches != len(inputs):
        yield f"{path}: counts {batches} batches of the refresh, there were {len(inputs)}"
    if inputs:
        values = torch.cat([each.transpose(0, 1).flatten(1) for each in inputs], dim=1).double()
        expected = {"running_mean": values.mean(1), "running_var": values.var(1)}
    else:  # no batch reached it
        expected = {part: initial[f"{path}.{part}"].double() for part in found}
    for part, value in expected.items():
        eps = torch.finfo(found[part].dtype).eps
        size = float(values.std()) if inputs else 1.0
        error = float((found[part].double() - value).abs().max())
        if not error <= 100 * eps * max(size, size**2, 1.0):
            yield f"{path}.{part}: off by {error:.2g} from that of the averaged weights"


def _wrong_accuracy(model: nn.Module, swap: State, accuracy: float) -> Iterator[str]:
    averaged = filled(model, swap).eval()
    pixels, labels = fuzz_models.images(train=False)
    with torch.no_grad():
        right = (averaged(pixels).argmax(1) == labels).sum().item()
    if right != round(accuracy * len(labels)):
        yield f"{right} of {len(labels)} test images are right, the run reports {accuracy:.4f}"


@torch.no_grad()
def filled(model: nn.Module, state: State) -> nn.Module:
    """Fill a model, in place, with the values of a file."""
    for name, tensor in _tensors(model).items():
        if not same(tensor, state[name]):  # an expanded buffer cannot be written to
            tensor.copy_(state[name])
    for path, module in model.named_modules():
        name = f"{path}.{EXTRA}".lstrip(".")
        if name in state:
            module.set_extra_state(deepcopy(_extra(state[name])))
    return model


def mean(tensors: list[Tensor]) -> Tensor:
    """Return the mean, computed in double precision and rounded once."""
    wide = torch.complex128 if tensors[0].is_complex() else torch.float64
    total = torch.stack([tensor.to(wide) for tensor in tensors]).sum(0)
    return total.div(len(tensors)).to(tensors[0].dtype)


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, also where they are NaN."""
    return _alike(one, other) and _bytes(one) == _bytes(other)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _place(found: Tensor, first: Tensor, second: Tensor) -> str:
    """Say which of the known tensors a wrong tensor equals."""
    known = {"the mean": mean([first, second]), "the first's": first, "the second's": second}
    return next((word for word, tensor in known.items() if same(found, tensor)), "none of them")


def _tensors(model: nn.Module) -> State:
    """Return the state dict without extra state; its tensors share the model's memory."""
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.endswith(EXTRA)}


def _extra(stored: Tensor) -> Any:
    return torch.load(io.BytesIO(stored.numpy().tobytes()), weights_only=True)
