"""One step, before training, on a model that is thrown away.

What cannot be trained, saved, loaded or built again ends with one line before phase 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor, nn

from swap_hpc.average.kinds import state_buffers
from swap_hpc.average.state import is_extra, state_of
from swap_hpc.data import Batches
from swap_hpc.data.sampling import Key
from swap_hpc.data.seeding import seed_all
from swap_hpc.data.splits import Split
from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import tensor_bytes
from swap_hpc.recipe.imports import in_one_line
from swap_hpc.recipe.training import LargeBatch, Refine
from swap_hpc.run.state_dict_checks import check_state_dict
from swap_hpc.run.unsaved_state import (
    Snapshot,
    attributes_of,
    changed_names,
    unsaved_attributes_warning,
    unsaved_state,
    unsaved_warning,
)
from swap_hpc.train.evaluation import evaluate
from swap_hpc.train.job import Batch, Job
from swap_hpc.train.models import fill_
from swap_hpc.train.optimizers import build_optimizer, check_follows_rate
from swap_hpc.train.parameter_groups import freeze_
from swap_hpc.train.state import (
    flatten,
    has_own_loading,
    optimizer_state,
    restore_optimizer_,
    unflatten,
)
from swap_hpc.train.step import backward

# Types of weights whose gradients torch's GradScaler can unscale.
SCALED_TYPES = (torch.float32, torch.float64, torch.bfloat16)

MEMORY_WARNING = (
    "warning: the dry step before training ran out of GPU memory, and training may, too: "
    "use smaller batches"
)


def dry_step(
    model: nn.Module, job: Job, settings: LargeBatch | Refine, key: Key, team: Team
) -> tuple[nn.Module, list[str]]:
    """Try all that a run will do with a model, on this rank's share of a phase's first batch.

    The builder is called again; a forward pass, a backward pass and a step of the optimizer are
    made; the state dict is loaded into another model; and the model is evaluated on the batch.
    Nothing is sent to other ranks.

    Args:
        model: as training begins; it is changed and must not be used any more.
        job: builds the model, and makes the batches.
        settings: the phase's section of the recipe.
        key: of the phase's batches.
        team: the ranks that share a batch.

    Returns:
        A model like `model`: the last one that the builder made, because a user's loss may refer
        to that one. And warnings: of what a step changes although it is not saved, or of memory
        that was too small.

    Raises:
        UserError: a run would fail; the message is one line.
    """
    name = job.recipe.model.name
    check_state_dict(model, name)
    other = _built_again(model, job)
    kept = job.copy_of(model)
    if any(type(module).__module__.startswith("horovod") for module in model.modules()):
        return kept, []  # Horovod's layers call other ranks, and Horovod is not started yet
    # The batch may lie in memory of its stream, which must live as long.
    stream = job.training_batches(settings, key, team)
    with _as_wrong_input(job.dataset.train):
        batch = next(stream)
    before = unsaved_state(model)
    seed_all(key.torch_seed(0, team.rank))
    try:
        with in_one_line(f"the model {name} fails in its first step"):
            warnings = _step(model, kept, batch, job, settings)
        _check_reload(model, other, name)
        changed = changed_names(before, unsaved_state(model))
        _check_buffers(model, changed, name)
        if isinstance(job.dataset.test, Batches):
            # A user's own batches may be of another kind in an evaluation.
            with _as_wrong_input(job.dataset.test):
                tested = list(islice(job.test_batches(team), 1))
        else:
            tested = [batch]
        if tested:
            _try_evaluation(model, tested, job)
    except torch.OutOfMemoryError:
        # Only a warning: here the memory holds one model more than in training.
        torch.cuda.empty_cache()
        return kept, [MEMORY_WARNING]
    kept.zero_grad()  # a loss that refers to it may have left gradients
    return kept, warnings + ([unsaved_warning(name, changed)] if changed else [])


def _try_evaluation(model: nn.Module, batches: list[Batch], job: Job) -> None:
    where = f"the model {job.recipe.model.name} fails in its first evaluation"
    try:
        with in_one_line(where), job.autocast():
            evaluate(model, batches, Team.alone(), job.objective)
    except RunError as error:  # of a metric, which would fail again
        raise UserError(str(error)) from error


@contextmanager
def _as_wrong_input(split: Split) -> Iterator[None]:
    """Turn a failure of a user's own batches into a UserError: it would fail again at a restart."""
    try:
        yield
    except RunError as error:
        if not isinstance(split, Batches):
            raise
        raise UserError(str(error)) from error


def _built_again(model: nn.Module, job: Job) -> nn.Module:
    """Return another model of the same builder.

    Raises:
        UserError: its tensors have other names, shapes or types.
    """
    other = job.build()
    layout, layout_again = _layout(model), _layout(other)
    if layout != layout_again:
        differing = sorted(name for name, *_ in set(layout) ^ set(layout_again))
        what = differing[0] if differing else "the order of its tensors"
        raise UserError(
            f"the builder of the model {job.recipe.model.name} makes a different model when it is "
            f"called again ({what} differs): phase 2 and every later start build the model anew; "
            "let it depend on its arguments alone"
        )
    return other


def _layout(model: nn.Module) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    tensors = chain(model.named_parameters(), model.named_buffers())
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]


def _step(
    model: nn.Module, begun: nn.Module, batch: Batch, job: Job, settings: LargeBatch | Refine
) -> list[str]:
    """Make one step of the optimizer, at a learning rate of 0; `begun` is the model before it.

    Returns:
        Warnings about the optimizer.
    """
    freeze_(model, job.recipe.optimizer)
    optimizer = build_optimizer(model, job.recipe.optimizer)
    before = attributes_of(optimizer)
    model.train()
    backward(model, batch, job, settings.accumulate)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            _check_gradient(f"{name} of the model {job.recipe.model.name}", parameter.grad, job)
    with in_one_line(f"the optimizer {job.recipe.optimizer.name} fails in its first step"):
        optimizer.step()
    lost = _lost_by_saving(optimizer, before, model, job)
    if ":" in job.recipe.optimizer.name:
        check_follows_rate(optimizer, model, begun, job.recipe.optimizer)
    model.zero_grad()
    if job.device.torch.type == "cuda":
        torch.cuda.synchronize()  # raises what a kernel found wrong, such as a label out of range
    return [unsaved_attributes_warning(job.recipe.optimizer.name, lost)] if lost else []


def _lost_by_saving(
    optimizer: torch.optim.Optimizer, before: Snapshot, model: nn.Module, job: Job
) -> list[str]:
    """Return the names of attributes that a step has changed and that saving does not keep.

    Raises:
        UserError: the state cannot be saved, or not be loaded.
    """
    name = job.recipe.optimizer.name
    with in_one_line(f"the state of the optimizer {name} cannot be saved and loaded"):
        state = optimizer_state(optimizer, model)
        state = unflatten(*flatten(state))  # refuses what a checkpoint could not keep
        after = attributes_of(optimizer)
        changed = changed_names(before, after)
        if not changed and not has_own_loading(optimizer):
            return []
        resumed = build_optimizer(model, job.recipe.optimizer)
        restore_optimizer_(resumed, model, state)
    differing = changed_names(attributes_of(resumed), after)
    return [each for each in changed if each in differing]


def _check_gradient(name: str, gradient: Tensor, job: Job) -> None:
    """Check that a parameter's gradient can be sent, and in fp16 scaled."""
    if gradient.layout is not torch.strided:
        raise UserError(
            f"{name} has a sparse gradient: build its layer with sparse=False (nn.Embedding)"
        )
    if job.recipe.precision == "fp16" and gradient.dtype not in SCALED_TYPES:
        kind = str(gradient.dtype).removeprefix("torch.")
        raise UserError(
            f'{name} is {kind}, whose gradients torch does not scale as precision = "fp16" needs: '
            "build the model with float32 weights, or set another precision"
        )


def _check_reload(model: nn.Module, other: nn.Module, name: str) -> None:
    """Check that the state dict, after a step, can be loaded into another model.

    Args:
        model: after the step.
        other: gets its state.
        name: of the model, for messages.

    Raises:
        UserError: it cannot, or the other model's state dict has another value.
    """
    state = state_of(model)
    fill_(other, state, "that the state dict holds after a step")
    loaded = state_of(other)
    for entry, tensor in state.items():
        if is_extra(entry):
            continue
        if not np.array_equal(tensor_bytes(tensor), tensor_bytes(loaded[entry])):
            raise UserError(
                f"{entry} of the model {name} has another value after its state dict was loaded: "
                "check its load_state_dict"
            )


def _check_buffers(model: nn.Module, changed: list[str], name: str) -> None:
    """Check that the state dict holds the buffers that a step changes."""
    lost = sorted(state_buffers(model).keys() & set(changed))
    if lost:
        raise UserError(
            f"the state dict of the model {name} leaves out {lost[0]}, which training changes: "
            "let it hold all of the model"
        )
