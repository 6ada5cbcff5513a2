"""What others would compute, with plain torch: no MPI, Horovod or DALI, none of our loops."""

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
from swap_hpc.recipe.schema import LargeBatch, Refine
from swap_hpc.swap import swap
from swap_hpc.train.events import LargeBatchEnded
from swap_hpc.train.job import Batch, Job


def batches(job: Job, phase: LargeBatch | Refine, key: Key) -> Iterator[tuple[float, Batch]]:
    """The learning rate and the whole batch of every step: the samples, which are not what is compared here."""
    steps = job.steps(phase)
    for step, batch in enumerate(job.training_batches(phase, key, Team.alone())):
        yield (
            float(rate_at(phase.learning_rate, step / steps % phase.epochs)),
            (batch[0].clone(), batch[1].clone()),
        )


def rate_at(knots: Any, epoch: float) -> Tensor:
    """Piecewise linear, by torch's own means."""
    x, y = torch.tensor(knots, dtype=torch.float64).T
    right = (
        int(torch.searchsorted(x, torch.tensor(epoch, dtype=torch.float64)).clamp(1, len(x) - 1))
        if len(x) > 1
        else 0
    )
    return (
        y[0]
        if len(x) == 1
        else torch.lerp(
            y[right - 1], y[right], ((epoch - x[right - 1]) / (x[right] - x[right - 1])).clamp(0, 1)
        )
    )


def reference_swap(job: Job) -> nn.Module:
    """SWAP in plain torch: train, copy, refine, average, and estimate batch norm anew."""
    recipe, model = job.recipe, tiny.model(job)

    def train(model: nn.Module, phase: LargeBatch | Refine, key: Key) -> nn.Module:
        sgd = torch.optim.SGD(
            model.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        model.train()
        for rate, (images, labels) in batches(job, phase, key):
            sgd.param_groups[0]["lr"] = rate
            sgd.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            sgd.step()
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
    """Mean and variance over all batch-norm inputs, layer by layer, each computed at once from all that came in."""
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
    pixels = {name: torch.cat(parts).transpose(0, 1).flatten(1) for name, parts in inputs.items()}
    return {
        f"{name}.{s}": v
        for name, x in pixels.items()
        for s, v in (("running_mean", x.mean(1)), ("running_var", x.var(1)))
    }


@pytest.mark.ranks(1, 2, 4)
def test_swap_equals_the_plain_torch_reference(world: Team) -> None:
    """Without batch norm in training, whose statistics belong to a rank's share of a batch."""
    job = tiny.job(
        groups=4,
        large_batch={"epochs": 3},
        refine={"epochs": 2, "learning_rate": [[0, 0.05], [1, 0.08], [2, 0.0]]},
    )
    model = tiny.model(job)
    with grid(world, 4) as ranks:
        for _ in swap(model, job, ranks):
            pass
    torch.testing.assert_close(
        tiny.weights(model), tiny.weights(reference_swap(job)), rtol=1e-4, atol=1e-6
    )
    assert not torch.allclose(
        tiny.weights(model), tiny.weights(tiny.model(job)), rtol=1e-2
    )  # it has learned something


@pytest.mark.ranks(1, 2)
def test_with_batch_norm_too_where_one_rank_sees_the_whole_batch(world: Team) -> None:
    job = tiny.job(
        groups=2, model={"name": "tiny:batch_normed", "weights": "given"}, large_batch={"epochs": 0}
    )
    model = tiny.model(job)
    with grid(world, 2) as ranks:
        for _ in swap(model, job, ranks):
            pass
    expected = reference_swap(job)
    statistics = moments(expected, job)
    for name, tensor in model.state_dict().items():
        wanted = statistics.get(name, expected.state_dict()[name])
        if tensor.is_floating_point():
            torch.testing.assert_close(
                tensor, wanted.to(tensor.dtype), rtol=1e-3, atol=1e-5, msg=name
            )


def test_one_group_with_cycles_equals_torchs_averaged_model(world: Team) -> None:
    """Sequential SWA: torch.optim.swa_utils.AveragedModel, updated at each cycle's end."""
    job = tiny.job(
        groups=1,
        refine={"epochs": 2, "cycles": 3, "batch_size": 24, "learning_rate": [[0, 0.1], [2, 0.01]]},
    )
    model = tiny.model(job)
    with grid(world, 1) as ranks:
        for _ in swap(model, job, ranks):
            pass
    theirs = tiny.model(job)
    for phase, key in (
        (job.recipe.large_batch, Key(0, Phase.LARGE_BATCH)),
        (job.recipe.refine, Key(0, Phase.REFINE)),
    ):
        sgd = torch.optim.SGD(
            theirs.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        averaged = torch.optim.swa_utils.AveragedModel(theirs)
        ends = job.steps(phase) * phase.epochs
        for step, (rate, (images, labels)) in enumerate(batches(job, phase, key), 1):
            sgd.param_groups[0]["lr"] = rate
            sgd.zero_grad()
            F.cross_entropy(theirs(images), labels).backward()
            sgd.step()
            if step % ends == 0:
                averaged.update_parameters(theirs)
    assert int(averaged.n_averaged) == 3
    torch.testing.assert_close(
        tiny.weights(model), tiny.weights(averaged.module), rtol=1e-4, atol=1e-6
    )


PLAIN_SGD = {"momentum": 0.0, "nesterov": False, "weight_decay": 5e-4}


@pytest.mark.ranks(1, 2, 4)
def test_averaging_after_every_step_of_plain_sgd_is_synchronous_sgd(world: Team) -> None:
    """Post-local SGD with one step between averages: the step of the mean of the groups' gradients."""
    refine = {"epochs": 2, "average_every_steps": 1, "learning_rate": [[0, 0.1], [2, 0.02]]}
    job = tiny.job(groups=4, optimizer=PLAIN_SGD, refine=refine)
    model, theirs = tiny.model(job), tiny.model(job)
    with grid(world, 4) as ranks:
        for event in swap(model, job, ranks):
            if isinstance(event, LargeBatchEnded):
                theirs.load_state_dict(event.model.state_dict())
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.0, weight_decay=5e-4)
    for steps in zip(
        *(batches(job, job.recipe.refine, Key(0, Phase.REFINE, group)) for group in range(4)),
        strict=True,
    ):
        sgd.param_groups[0]["lr"] = steps[0][0]
        sgd.zero_grad()
        images, labels = (
            torch.cat(parts) for parts in zip(*(batch for _, batch in steps), strict=True)
        )
        F.cross_entropy(theirs(images), labels).backward()
        sgd.step()
    torch.testing.assert_close(tiny.weights(model), tiny.weights(theirs), rtol=1e-4, atol=1e-6)


@pytest.mark.ranks(1, 2, 4)
def test_post_local_sgd_keeps_each_groups_momentum(world: Team) -> None:
    """Four copies with an optimizer each, their parameters replaced by their mean after every 5 steps, and at the end."""
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
    optimizers = [
        torch.optim.SGD(copy.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=5e-4)
        for copy in copies
    ]
    groups = (
        list(batches(job, job.recipe.refine, Key(0, Phase.REFINE, group))) for group in range(4)
    )
    for step, round_ in enumerate(zip(*groups, strict=True), 1):
        for copy, sgd, (rate, (images, labels)) in zip(copies, optimizers, round_, strict=True):
            sgd.param_groups[0]["lr"] = rate
            sgd.zero_grad()
            F.cross_entropy(copy(images), labels).backward()
            sgd.step()
        if step % 5 == 0 or step == 2 * job.steps(job.recipe.refine):
            with torch.no_grad():
                for each in zip(*(copy.parameters() for copy in copies), strict=True):
                    mean = torch.stack(each).mean(0)
                    for parameter in each:
                        parameter.copy_(mean)
    torch.testing.assert_close(tiny.weights(model), tiny.weights(copies[0]), rtol=1e-4, atol=1e-6)
