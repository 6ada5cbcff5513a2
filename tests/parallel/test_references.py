"""Whole trainings equal references in plain torch, without MPI, Horovod, DALI or our loops."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swap_hpc.data.sampling import Key
from swap_hpc.parallel.grid import grid
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import Phase
from swap_hpc.recipe.training import LargeBatch, Refine
from swap_hpc.swap import swap
from swap_hpc.train.events import LargeBatchEnded
from swap_hpc.train.job import Batch, Job


def batches(job: Job, phase: LargeBatch | Refine, key: Key) -> Iterator[tuple[float, Batch]]:
    """Yield the learning rate and the whole batch of every step.

    The samples are the job's own: they are not compared here.
    """
    steps = job.steps(phase)
    for step, (images, labels) in enumerate(job.training_batches(phase, key, Team.alone())):
        rate = rate_at(phase.learning_rate, step / steps % phase.epochs)
        yield float(rate), (images.clone(), labels.clone())


def rate_at(knots: Any, epoch: float) -> Tensor:
    """Interpolate the learning rate linearly between knots, with functions of torch."""
    x, y = torch.tensor(knots, dtype=torch.float64).T
    if len(x) == 1:
        return y[0]
    place = torch.searchsorted(x, torch.tensor(epoch, dtype=torch.float64))
    right = int(place.clamp(1, len(x) - 1))
    left = right - 1
    share = ((epoch - x[left]) / (x[right] - x[left])).clamp(0, 1)
    return torch.lerp(y[left], y[right], share)


def sgd_of(model: nn.Module) -> torch.optim.SGD:
    """Return torch's optimizer with the settings of a recipe's default."""
    return torch.optim.SGD(
        model.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=5e-4
    )


def step_(model: nn.Module, sgd: torch.optim.Optimizer, rate: float, batch: Batch) -> None:
    """Take one step of SGD on a batch."""
    images, labels = batch
    sgd.param_groups[0]["lr"] = rate
    sgd.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    sgd.step()


def reference_swap(job: Job) -> nn.Module:
    """Return a model trained by SWAP: train, copy, refine, average. Batch norm is left out."""
    recipe, model = job.recipe, tiny.model(job)

    def train(model: nn.Module, phase: LargeBatch | Refine, key: Key) -> nn.Module:
        sgd = sgd_of(model)
        model.train()
        for rate, batch in batches(job, phase, key):
            step_(model, sgd, rate, batch)
        return model

    train(model, recipe.large_batch, Key(recipe.seed, Phase.LARGE_BATCH))
    copies = [
        train(deepcopy(model), recipe.refine, Key(recipe.seed, Phase.REFINE, group))
        for group in range(recipe.groups)
    ]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.stack([copy.get_parameter(name) for copy in copies]).mean(0))
    return model


def moments(model: nn.Module, job: Job) -> dict[str, Tensor]:
    """Return the running statistics of each batch-norm layer, computed from all inputs at once."""
    norms = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)
    }
    inputs: dict[str, list[Tensor]] = {name: [] for name in norms}
    for name, layer in norms.items():
        layer.register_forward_pre_hook(
            lambda _, args, name=name: inputs[name].append(args[0].double())
        )
    model.eval()
    for layer in norms.values():
        layer.train()
    with torch.no_grad():
        for images in job.batchnorm_batches(Team.alone()):
            model(images)
    found = {}
    for name, parts in inputs.items():
        pixels = torch.cat(parts).transpose(0, 1).flatten(1)
        found[f"{name}.running_mean"] = pixels.mean(1)
        found[f"{name}.running_var"] = pixels.var(1)
    return found


def train(model: nn.Module, job: Job, world: Team) -> None:
    """Train `model` with `swap()`."""
    with grid(world, job.recipe.groups) as ranks:
        for _ in swap(model, job, ranks):
            pass


@pytest.mark.ranks(1, 2, 4)
def test_swap_equals_the_plain_torch_reference(world: Team) -> None:
    """Without batch norm, which normalises each rank's share of a batch by itself."""
    job = tiny.job(
        groups=4,
        large_batch={"epochs": 3},
        refine={"epochs": 2, "learning_rate": [[0, 0.05], [1, 0.08], [2, 0.0]]},
    )
    model = tiny.model(job)
    train(model, job, world)
    found, expected = tiny.weights(model), tiny.weights(reference_swap(job))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    untrained = tiny.weights(tiny.model(job))
    assert not torch.allclose(found, untrained, rtol=1e-2)


@pytest.mark.ranks(1, 2)
def test_batch_norm_equals_the_reference_if_a_rank_sees_the_whole_batch(world: Team) -> None:
    job = tiny.job(
        groups=2, model={"name": "tiny:batch_normed", "weights": "given"}, large_batch={"epochs": 0}
    )
    model = tiny.model(job)
    train(model, job, world)
    expected = reference_swap(job)
    statistics = moments(expected, job)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            wanted = statistics.get(name, expected.state_dict()[name]).to(tensor.dtype)
            torch.testing.assert_close(tensor, wanted, rtol=1e-3, atol=1e-5, msg=name)


def test_one_group_with_cycles_equals_torchs_averaged_model(world: Team) -> None:
    """Sequential SWA: torch.optim.swa_utils.AveragedModel, updated at each cycle's end."""
    job = tiny.job(
        groups=1,
        refine={"epochs": 2, "cycles": 3, "batch_size": 24, "learning_rate": [[0, 0.1], [2, 0.01]]},
    )
    model = tiny.model(job)
    train(model, job, world)
    theirs = tiny.model(job)
    for phase, key in (
        (job.recipe.large_batch, Key(0, Phase.LARGE_BATCH)),
        (job.recipe.refine, Key(0, Phase.REFINE)),
    ):
        sgd = sgd_of(theirs)
        averaged = torch.optim.swa_utils.AveragedModel(theirs)
        steps_per_cycle = job.steps(phase) * phase.epochs
        for step, (rate, batch) in enumerate(batches(job, phase, key), 1):
            step_(theirs, sgd, rate, batch)
            if step % steps_per_cycle == 0:
                averaged.update_parameters(theirs)
    assert int(averaged.n_averaged) == 3
    found, expected = tiny.weights(model), tiny.weights(averaged.module)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def average_(models: list[nn.Module]) -> None:
    """Replace the parameters of all models by their mean."""
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        mean = torch.stack(parameters).mean(0)
        for parameter in parameters:
            parameter.copy_(mean)


PLAIN_SGD = {"momentum": 0.0, "nesterov": False, "weight_decay": 5e-4}


@pytest.mark.ranks(1, 2, 4)
def test_averaging_after_every_step_of_plain_sgd_is_synchronous_sgd(world: Team) -> None:
    """With one step between averages, post-local SGD steps by the mean of the groups' gradients."""
    refine = {"epochs": 2, "average_every_steps": 1, "learning_rate": [[0, 0.1], [2, 0.02]]}
    job = tiny.job(groups=4, optimizer=PLAIN_SGD, refine=refine)
    model, theirs = tiny.model(job), tiny.model(job)
    with grid(world, 4) as ranks:
        for event in swap(model, job, ranks):
            if isinstance(event, LargeBatchEnded):
                theirs.load_state_dict(event.model.state_dict())
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.0, weight_decay=5e-4)
    groups = [batches(job, job.recipe.refine, Key(0, Phase.REFINE, group)) for group in range(4)]
    for steps in zip(*groups, strict=True):
        rate = steps[0][0]
        images = torch.cat([images for _, (images, _) in steps])
        labels = torch.cat([labels for _, (_, labels) in steps])
        step_(theirs, sgd, rate, (images, labels))
    torch.testing.assert_close(tiny.weights(model), tiny.weights(theirs), rtol=1e-4, atol=1e-6)


@pytest.mark.ranks(1, 2, 4)
def test_post_local_sgd_keeps_each_groups_momentum(world: Team) -> None:
    """The reference: four copies, each with an optimizer, averaged every 5 steps and at the end."""
    job = tiny.job(
        groups=4,
        refine={"epochs": 2, "average_every_steps": 5, "learning_rate": [[0, 0.1], [2, 0.02]]},
    )
    model, start = tiny.model(job), tiny.model(job)
    with grid(world, 4) as ranks:
        for event in swap(model, job, ranks):
            if isinstance(event, LargeBatchEnded):
                start.load_state_dict(event.model.state_dict())
    copies = [deepcopy(start) for _ in range(4)]
    optimizers = [sgd_of(copy) for copy in copies]
    refine = job.recipe.refine
    groups = [list(batches(job, refine, Key(0, Phase.REFINE, group))) for group in range(4)]
    last = refine.epochs * job.steps(refine)
    for step, steps in enumerate(zip(*groups, strict=True), 1):
        for copy, sgd, (rate, batch) in zip(copies, optimizers, steps, strict=True):
            step_(copy, sgd, rate, batch)
        if step % 5 == 0 or step == last:
            average_(copies)
    torch.testing.assert_close(tiny.weights(model), tiny.weights(copies[0]), rtol=1e-4, atol=1e-6)
