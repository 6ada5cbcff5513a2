"""One step on a model that is thrown away: what cannot be trained, saved, loaded or built again ends before phase 1."""

import random
import re
from collections.abc import Iterator, Sized
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from swap_hpc.average.kinds import state_buffers
from swap_hpc.average.state import EXTRA_STATE, decoded, encoded, is_extra, state_of
from swap_hpc.data import Batches
from swap_hpc.data.sampling import Key
from swap_hpc.data.seeding import seed_all
from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import tensor_bytes
from swap_hpc.recipe.imports import place_of
from swap_hpc.recipe.schema import LargeBatch, Refine
from swap_hpc.train.evaluation import evaluate
from swap_hpc.train.job import Job
from swap_hpc.train.models import fill_
from swap_hpc.train.optimizers import build_optimizer
from swap_hpc.train.step import backward


def dry_step(
    model: nn.Module, job: Job, phase: LargeBatch | Refine, key: Key, team: Team
) -> tuple[nn.Module, list[str]]:
    """Tries all that a run will ask of a model, with this rank's share of the phase's first batch. Gives `model` up for that.

    The builder is called again, the state dict goes out of one model and into another, a forward pass, a backward pass
    and a step of the optimizer are made, and an evaluation. Nothing is sent to other ranks.

    Returns a model like `model`, the last one that the builder made, and warnings: what a step changes in a model that its
    state dict does not hold. Raises UserError, in one line.
    """
    name = job.recipe.model.name
    _check_state(model, name)
    other = _built_again(model, job)
    kept = job.copy_of(model)
    if any(type(module).__module__.startswith("horovod") for module in model.modules()):
        return kept, []  # its layers ask other ranks, by a Horovod that is not started yet
    stream = job.training_batches(
        phase, key, team
    )  # lives on while its batch is used, whose memory may be its own
    batch = next(stream)
    before = _outside_state(model)
    seed_all(key.torch_seed(0, team.rank))
    try:
        with _in_one_line(f"the model {name} fails in its first step"):
            _step(model, batch, job, phase)
        _check_comes_back(model, other, name)
        changed = _changed(before, _outside_state(model))
        if lost := sorted(state_buffers(model).keys() & set(changed)):
            raise UserError(
                f"the state dict of the model {name} leaves out {lost[0]}, which training changes: let it hold all of the model"
            )
        if not isinstance(
            job.dataset.train, Batches
        ):  # else an evaluation's inputs may be of another kind
            with _in_one_line(f"the model {name} fails in its first evaluation"), job.autocast():
                evaluate(model, [batch], Team.alone(), job.objective)
    except torch.OutOfMemoryError:  # with one model more than a phase needs
        torch.cuda.empty_cache()
        return kept, [
            "warning: the step that is tried before training ran out of memory on the GPU; training may, too: smaller batches"
        ]
    kept.zero_grad()  # of a loss that knows the builder's last model
    return kept, [_warning(name, changed)] if changed else []


def _check_state(model: nn.Module, name: str) -> None:
    """Raises UserError where the state dict is not what is trained, or cannot be written to a file and read again."""
    state = model.state_dict()
    for entry, value in state.items():
        if is_extra(entry):
            _check_extra_state(entry, value, name)
        elif not isinstance(value, Tensor):
            kind = type(value).__name__
            raise UserError(
                f"the state dict of the model {name} holds {entry}, a {kind}: only tensors, and get_extra_state, can be saved"
            )
    tensors = {
        entry: value
        for entry, value in state.items()
        if isinstance(value, Tensor) and not is_extra(entry)
    }
    _check_types(tensors, name)
    places = {_place(t) for t in tensors.values()}
    for entry, tensor in chain(model.named_parameters(), model.named_buffers()):
        missing = entry not in tensors and _place(tensor) not in places and tensor.requires_grad
        if tensor.numel() and (
            missing or (entry in tensors and _place(tensors[entry]) != _place(tensor))
        ):
            how = "leaves out" if missing else "hands out a copy of"
            raise UserError(
                f"the state dict of the model {name} {how} {entry}: what is saved would not be what is trained; "
                "let it hold the model's own tensors"
            )


def _check_extra_state(entry: str, value: Any, name: str) -> None:
    module = entry.removesuffix(EXTRA_STATE).removesuffix(".") or "the module"
    try:
        decoded(encoded(value))
    except Exception as error:  # whatever pickle meets in it
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"get_extra_state of {module} of the model {name} returns {f'a {found[1]}' if found else 'a value'}, which cannot be "
            "loaded without running code: return tensors, numbers, strings, lists and dictionaries"
        ) from None


def _check_types(tensors: dict[str, Tensor], name: str) -> None:
    for dtype, entry in {t.dtype: entry for entry, t in reversed(tensors.items())}.items():
        try:
            save({entry: torch.empty(0, dtype=dtype)})
        except (KeyError, ValueError, SafetensorError):
            kind = str(dtype).removeprefix("torch.")
            raise UserError(
                f"{entry} of the model {name} is {kind}, which a .safetensors file cannot hold: use another type"
            ) from None


def _place(tensor: Tensor) -> tuple[int, torch.dtype, torch.Size]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape


def _built_again(model: nn.Module, job: Job) -> nn.Module:
    """Another model of the same builder. Raises UserError where it is not of the same tensors."""
    other = job.build()
    layout, again = (
        [
            (name, tuple(t.shape), t.dtype)
            for name, t in chain(m.named_parameters(), m.named_buffers())
        ]
        for m in (model, other)
    )
    if layout != again:
        name = next(
            iter(sorted(n for n, *_ in set(layout) ^ set(again))), "the order of its tensors"
        )
        raise UserError(
            f"the builder of the model {job.recipe.model.name} makes another model when it is called again ({name} differs): "
            "phase 2 and every later start build it anew; let it depend on its arguments alone"
        )
    return other


def _step(
    model: nn.Module, batch: tuple[Tensor, Tensor], job: Job, phase: LargeBatch | Refine
) -> None:
    optimizer = build_optimizer(model, job.recipe.optimizer)  # whose rate is 0
    model.train()
    backward(model, batch, job, phase.accumulate)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.layout is not torch.strided:
            raise UserError(
                f"{name} of the model {job.recipe.model.name} has a sparse gradient: build its layer with sparse=False (nn.Embedding)"
            )
    optimizer.step()
    model.zero_grad()
    if job.device.torch.type == "cuda":
        torch.cuda.synchronize()  # what the GPU finds wrong, a label out of range, is said here


def _check_comes_back(model: nn.Module, other: nn.Module, name: str) -> None:
    """Raises UserError where the state dict, after a step, does not go into another model. Changes `other`."""
    state = state_of(model)
    fill_(other, state, "that the state dict holds after a step")
    loaded = state_of(other)
    for entry, tensor in state.items():
        if not is_extra(entry) and not np.array_equal(
            tensor_bytes(tensor), tensor_bytes(loaded[entry])
        ):
            raise UserError(
                f"{entry} of the model {name} is another after its state dict was loaded: see its load_state_dict"
            )


@contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    try:
        yield
    except (UserError, RunError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a user's model, loss or metric raises
        raise UserError(f"{what}: {_short(error)}{place_of(error)}") from None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


Snapshot = dict[
    str, tuple[Any, Any]
]  # where a value stands -> the value, and what to compare it by


def _outside_state(model: nn.Module) -> Snapshot:
    """Plain attributes of the modules, generators' states among them, and buffers that the state dict leaves out."""
    held = {t.data_ptr() for t in model.state_dict().values() if isinstance(t, Tensor)}
    found: Snapshot = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        plain = {k: v for k, v in vars(module).items() if k not in _INTERNAL}
        passing = {k: b for k, b in module.named_buffers(recurse=False) if b.data_ptr() not in held}
        if (
            type(module).get_extra_state is nn.Module.get_extra_state
        ):  # else it saves what it needs of them
            found |= {prefix + k: (v, _to_compare(v)) for k, v in (plain | passing).items()}
    return found


_INTERNAL = {*vars(nn.Module()), "_forward_hooks_with_kwargs"}


def _to_compare(value: Any) -> Any:
    """What tells whether a value has changed; None where nothing cheap does."""
    with suppress(Exception):  # sparse arrays, quantized tensors, whatever else refuses
        return _comparable(value)
    return None


def _comparable(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state())
    if isinstance(value, random.Random):
        return hash(value.getstate())
    if isinstance(value, Tensor):
        return None if nn.parameter.is_lazy(value) else hash(tensor_bytes(value).tobytes())
    if isinstance(value, np.ndarray):
        return hash(value.tobytes())
    if isinstance(value, bool | int | float | complex | str):
        return value
    return len(value) if isinstance(value, Sized) and not isinstance(value, nn.Module) else None


def _changed(before: Snapshot, after: Snapshot) -> list[str]:
    """Where a value was there before and is another now, but for tensors that were computed from parameters."""
    return [
        name
        for name, (value, now) in after.items()
        if before.get(name, (None, None))[1] not in (None, now)
        and not (isinstance(value, Tensor) and value.grad_fn is not None)
    ]


def _warning(name: str, changed: list[str]) -> str:
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return (
        f"warning: a step changes {', '.join(changed[:3])}{more} of the model {name}, which its state dict does not hold: "
        "phase 2 and a run that goes on begin with what the builder makes; a buffer or get_extra_state keeps it"
    )
