"""A whole run on a stand-in for a GPU, for hosts without one.

    python tests/gpu_stand_in.py FOLDER [FIELD=VALUE ...]

The stand-in's tensors report the device "cuda", hold their values on the CPU, and refuse operations
with CPU tensors. So a run shows which line of the package mixes devices. Everything runs except the
autograd engine, which needs a driver: a backward pass gives each parameter that took part a
gradient made of its own values, and calls its hooks.

Prints a line for each command: its name, and the hash of the weights that it made.
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

# Operators that copy values from one device to the other.
CROSSING = {aten.copy_.default, aten._to_copy.default}

# Operators on GPU tensors that also take a CPU scalar.
WITH_SCALARS = {
    aten.add,
    aten.sub,
    aten.mul,
    aten.div,
    aten.where,
    aten.eq,
    aten.ge,
    aten.lt,
    aten.gt,
}


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
    """Sends every operator to `dispatch`, also those that make tensors from none."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(function, args, kwargs or {})


def dispatch(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values that tensors hold.

    Raises:
        RuntimeError: the tensors are on two devices, where a GPU would refuse them, too.
    """
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    on_gpu = [each for each in tensors if isinstance(each, OnGpu)]
    on_cpu = [each for each in tensors if not isinstance(each, OnGpu)]
    if on_gpu and on_cpu and function not in CROSSING:
        check_scalars(function, on_gpu, on_cpu)
    device = kwargs.get("device")
    options = dict(kwargs)
    if device is not None:
        options["device"] = torch.device("cpu")
    if options.get("pin_memory"):
        options["pin_memory"] = False  # needs a driver
    result = function(*tree_map(held, args), **tree_map(held, options))
    if function._schema.is_mutable and isinstance(result, Tensor):
        return kwargs.get("out", args[0])
    goes_to_gpu = bool(on_gpu) if device is None else torch.device(device).type == "cuda"
    return tree_map(wrapped, result) if goes_to_gpu else result


def check_scalars(function: Any, on_gpu: list[OnGpu], on_cpu: list[Tensor]) -> None:
    """Raise RuntimeError unless the CPU tensors are scalars, and the operator takes such."""
    if function.overloadpacket in WITH_SCALARS and all(each.ndim == 0 for each in on_cpu):
        return
    gpu_shapes = [tuple(each.shape) for each in on_gpu]
    cpu_shapes = [tuple(each.shape) for each in on_cpu]
    raise RuntimeError(
        f"{function} mixes devices: {gpu_shapes} on the GPU, {cpu_shapes} on the CPU"
    )


def held(value: Any) -> Any:
    """Return the values that a tensor of the stand-in holds, and anything else as it is."""
    return value.held if isinstance(value, OnGpu) else value


def wrapped(value: Any) -> Any:
    """Return a tensor as one of the stand-in, and anything else as it is."""
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
    """Let torch report a GPU, and use the stand-in for it."""
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
    torch._C._ensureCUDADeviceGuardSet()  # views need one
    torch.backends.cudnn.enabled = False
    # A parameter's class cannot change in place: moving a model replaces its parameters.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    Tensor.backward = backward  # type: ignore[assignment,method-assign]


QUICK = (
    "groups=2",
    "large_batch.epochs=2",
    "large_batch.stop_accuracy=1.0",
    "refine.epochs=2",
    "checkpoint.snapshots=1",
)


def main(folder: Path, fields: list[str]) -> None:
    """Run a recipe; run it again, stopped and resumed; then run the commands on its folder."""
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
    recipe = load_recipe("digits", [*QUICK, *(fields or ["model.width=4"])])
    console = Console(quiet=True)
    whole, again = folder / "whole", folder / "again"

    def report(name: str, value: object) -> None:
        if world.rank == 0:
            print(name, value, flush=True)

    def run(out: Path, control: Control) -> str:
        result = train(recipe, out, world, console, control, perf_counter())
        assert result is not None
        return result["weights_sha256"]

    with StandIn():
        report("train", run(whole, Control()))
        stops = StopsAfter(40)
        try:
            run(again, stops)
        except Stopped:
            report("stopped", stops.heartbeats)
        report("went on", run(again, Control()))
        report("average", saved.average(whole, None, None, world).weights_sha256)
        averaged = whole / "swap.safetensors"
        report("evaluate", saved.evaluate(averaged, None, world).weights_sha256)
        # Groups that continue from their average lie too close together for a plane.
        if world.size == 1 and not recipe.refine.average_every_steps:
            landscape(whole, None, 3, 100, world, lambda text: None)
            report("landscape", (whole / "landscape.png").is_file())
            trajectory(whole, None, 100, world, lambda text: None)
            report("trajectory", (whole / "trajectory.png").is_file())


class Mixed(torch.nn.Module):
    """A model, for a recipe to name, whose forward pass forgets that its input may be on a GPU."""

    def __init__(self, classes: int, channels: int, width: int = 0) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(channels, classes, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images).mean((2, 3)) + torch.ones(10)


if __name__ == "__main__":
    from swap_hpc.train.control import Control

    class StopsAfter(Control):
        """Asks for a stop at a heartbeat."""

        def __init__(self, last: int) -> None:
            super().__init__()
            self.last = last

        def heartbeat(self, where: str) -> None:
            super().heartbeat(where)
            self.stop = self.stop or self.heartbeats >= self.last

    pretend()
    main(Path(sys.argv[1]), sys.argv[2:])
