"""A whole run on a stand-in for a GPU, which shows the lines of the package that mix devices.

    python tests/gpu_stand_in.py FOLDER [FIELD=VALUE ...]

The stand-in's tensors report the device "cuda", hold CPU data, and cannot be combined with CPU
tensors. Everything runs except the autograd engine, which needs a driver. Instead, a backward pass
gives each parameter that took part a gradient made from its own values, and calls its hooks.
Prints the hash of what each command made, one line each.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
# Operators that move values from one device to the other.
CROSSING = {aten.copy_.default, aten._to_copy.default}
# Operators of which one argument may be a CPU tensor without dimensions.
ARITHMETIC = {aten.add, aten.sub, aten.mul, aten.div}
COMPARISONS = {aten.eq, aten.ge, aten.lt, aten.gt}
ONE_NUMBER = ARITHMETIC | COMPARISONS | {aten.where}


class OnGpu(Tensor):
    """A tensor of the stand-in."""

    held: Tensor  # the values, on the CPU; views share them

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGpu":
        layout: Any = {
            "strides": held.stride(),
            "storage_offset": held.storage_offset(),
            "dtype": held.dtype,
            "layout": held.layout,
        }
        return Tensor._make_wrapper_subclass(
            cls, held.shape, device=GPU, requires_grad=held.requires_grad, **layout
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self, **how: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.held})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def new_tensor(self, data: Any, *unused: Any, **how: Any) -> Tensor:
        return OnGpu(self.held.new_tensor(data, **how))


class StandIn(TorchDispatchMode):
    """A context in which every operator goes through `dispatch`, also those that create tensors."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(function, args, kwargs or {})


def dispatch(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values that tensors hold.

    Raises:
        RuntimeError: tensors of two devices meet, where a GPU would refuse them.
    """
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    there = [each for each in tensors if isinstance(each, OnGpu)]
    here = [each for each in tensors if not isinstance(each, OnGpu)]
    if there and here and not may_mix(function, here):
        shapes = [[tuple(each.shape) for each in side] for side in (there, here)]
        raise RuntimeError(
            f"{function} mixes devices: {shapes[0]} on the GPU, {shapes[1]} on the CPU"
        )
    device = kwargs.get("device")
    on_cpu = dict(kwargs)
    if device is not None:
        on_cpu["device"] = torch.device("cpu")
    if on_cpu.get("pin_memory"):
        on_cpu["pin_memory"] = False  # pinning needs a driver
    result = function(*tree_map(held, args), **tree_map(held, on_cpu))
    if function._schema.is_mutable and isinstance(result, Tensor):
        return kwargs.get("out", args[0])
    on_gpu = bool(there) if device is None else torch.device(device).type == "cuda"
    return tree_map(wrapped, result) if on_gpu else result


def may_mix(function: Any, here: list[Tensor]) -> bool:
    """Return whether an operator accepts the CPU tensors `here` beside tensors on the GPU."""
    scalars = all(each.ndim == 0 for each in here)
    return function in CROSSING or (function.overloadpacket in ONE_NUMBER and scalars)


def held(value: Any) -> Any:
    return value.held if isinstance(value, OnGpu) else value


def wrapped(value: Any) -> Any:
    return OnGpu(value) if isinstance(value, Tensor) else value


def backward(loss: Tensor, *unused: Any, **also_unused: Any) -> None:
    """Give the parameters behind `loss` gradients, and call their hooks, as the engine does."""
    for parameter in leaves(loss.grad_fn):
        with torch.no_grad():
            step = (parameter.detach() * (1 + loss.detach())).cos() * 0.1
            parameter.grad = step if parameter.grad is None else parameter.grad + step
        for hook in (parameter._post_accumulate_grad_hooks or {}).values():
            hook(parameter)


def leaves(root: Any) -> Iterator[Tensor]:
    """Yield the parameters from which a value was computed, the last ones first."""
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [each for each, _ in node.next_functions]


def pretend() -> None:
    """Make torch report a GPU, and use the stand-in for it."""
    properties = SimpleNamespace(name="stand-in", major=9, minor=0, uuid="the only one")
    replaced: dict[str, Callable[..., Any]] = {
        "device_count": lambda: 1,
        "get_device_properties": lambda index: properties,
        "get_device_name": lambda device=None: properties.name,
        "get_arch_list": lambda: ["sm_90"],
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "_lazy_init": lambda: None,
    }
    for name, function in replaced.items():
        setattr(torch.cuda, name, function)
    torch._C._ensureCUDADeviceGuardSet()  # views ask for one
    torch.backends.cudnn.enabled = False
    # A parameter cannot change its class in place.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    Tensor.backward = backward  # type: ignore[assignment,method-assign]


def main(folder: Path, fields: list[str]) -> None:
    """Do a run, do it again with a stop in the middle, and call the commands on the first one."""
    from rich.console import Console

    from swap_hpc.errors import Stopped
    from swap_hpc.parallel.teams import Team
    from swap_hpc.recipe.loading import load_recipe
    from swap_hpc.run import saved
    from swap_hpc.run.run import train
    from swap_hpc.study.landscape import landscape
    from swap_hpc.study.trajectory import trajectory
    from swap_hpc.train.control import Control

    world = Team.world()
    quick = [
        "groups=2",
        "large_batch.epochs=2",
        "large_batch.stop_accuracy=1.0",
        "refine.epochs=2",
        "checkpoint.snapshots=1",
    ]
    recipe = load_recipe("digits", [*quick, *(fields or ["model.width=4"])])

    def tell(name: str, value: object) -> None:
        if world.rank == 0:
            print(name, value, flush=True)

    console = Console(quiet=True)
    with StandIn():
        # The result is the first rank's.
        result = train(recipe, folder / "whole", world, console, Control(), perf_counter())
        whole = world.broadcast(result)
        assert whole
        tell("train", whole["weights_sha256"])
        stops = StopsAfter(40)
        try:
            train(recipe, folder / "again", world, console, stops, perf_counter())
        except Stopped:
            tell("stopped", stops.heartbeats)
        result = train(recipe, folder / "again", world, console, Control(), perf_counter())
        again = world.broadcast(result)
        assert again
        tell("resumed", again["weights_sha256"])
        tell("average", saved.average(folder / "whole", None, None, world).weights_sha256)
        swap = folder / "whole" / "swap.safetensors"
        tell("evaluate", saved.evaluate(swap, None, world).weights_sha256)
        # Groups that continue from their average lie too close together for a plane.
        if world.size == 1 and not recipe.refine.average_every_steps:
            landscape(folder / "whole", None, 3, 100, world, lambda text: None)
            tell("landscape", (folder / "whole" / "landscape.png").is_file())
            trajectory(folder / "whole", None, 100, world, lambda text: None)
            tell("trajectory", (folder / "whole" / "trajectory.png").is_file())


class Mixed(torch.nn.Module):
    """A model whose forward pass makes a CPU tensor; a recipe can name it as a builder."""

    def __init__(self, classes: int, channels: int, width: int = 0) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(channels, classes, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images).mean((2, 3)) + torch.ones(10)


if __name__ == "__main__":
    from swap_hpc.train.control import Control

    class StopsAfter(Control):
        """A control that is asked to stop at heartbeat number `last`."""

        def __init__(self, last: int) -> None:
            super().__init__()
            self.last = last

        def heartbeat(self, where: str) -> None:
            super().heartbeat(where)
            self.stop = self.stop or self.heartbeats >= self.last

    pretend()
    main(Path(sys.argv[1]), sys.argv[2:])
