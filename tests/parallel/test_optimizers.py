"""The optimizer fields of a recipe: a phase on any number of ranks equals the formulas by hand."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swap_hpc.data.sampling import Key
from swap_hpc.errors import UserError
from swap_hpc.parallel.gradients import gradient_averaging
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.optimizer import DEFAULTS, Optimizer
from swap_hpc.recipe.phase import PHASE_1, Phase
from swap_hpc.run.checks import check_ranks
from swap_hpc.train.fit import fit
from swap_hpc.train.job import Job
from swap_hpc.train.optimizers import build_optimizer, torch_optimizers

KEY = Key(0, Phase.LARGE_BATCH)

# (weights, gradient, velocity, learning rate) -> step; the velocity is changed in place
Update = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def trained(job: Job, world: Team) -> nn.Module:
    model = tiny.model(job)
    for _ in fit(model, job, PHASE_1, world):
        pass
    return model


def by_hand(job: Job, update: Update, smoothing: float = 0.0) -> nn.Module:
    """Train the phase on whole batches, with every formula written out."""
    model, phase = tiny.model(job), job.recipe.large_batch
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for step, (images, labels) in enumerate(job.training_batches(phase, KEY, Team.alone())):
        targets = F.one_hot(labels, 3) * (1 - smoothing) + smoothing / 3
        loss = -(targets * F.log_softmax(model(images), 1)).sum(1).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        rate = phase.rate(step / job.steps(phase))
        with torch.no_grad():
            for p, g, v in zip(model.parameters(), gradients, velocity, strict=True):
                p.sub_(update(p, g, v, rate))
    return model


def nesterov(decay: float, momentum: float = 0.9) -> Update:
    def update(w: Tensor, g: Tensor, v: Tensor, rate: float) -> Tensor:
        g = g + decay * w
        v.mul_(momentum).add_(g)
        return rate * (g + momentum * v)

    return update


def same(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(tiny.weights(one), tiny.weights(other), rtol=1e-4, atol=1e-6)


def test_nesterov(world: Team) -> None:
    job = tiny.job(large_batch={"epochs": 3})
    same(trained(job, world), by_hand(job, nesterov(5e-4)))


def test_label_smoothing(world: Team) -> None:
    job = tiny.job(label_smoothing=0.3)
    same(trained(job, world), by_hand(job, nesterov(5e-4), smoothing=0.3))


def test_vectors_without_weight_decay(world: Team) -> None:
    job = tiny.job(optimizer={"weight_decay": 0.5, "decay_vectors": False})
    decayed, plain = nesterov(0.5), nesterov(0.0)

    def update(w: Tensor, g: Tensor, v: Tensor, rate: float) -> Tensor:
        return (decayed if w.ndim > 1 else plain)(w, g, v, rate)

    same(trained(job, world), by_hand(job, update))


@pytest.mark.parametrize("spares_vectors", [False, True])
def test_lars(world: Team, spares_vectors: bool) -> None:
    optimizer = {
        "name": "lars",
        "trust": 0.02,
        "weight_decay": 0.01,
        "nesterov": False,
        "decay_vectors": not spares_vectors,
    }
    phase = {"epochs": 3, "learning_rate": [[0, 0.5], [3, 2.0]]}
    job = tiny.job(optimizer=optimizer, large_batch=phase)

    def update(w: Tensor, g: Tensor, v: Tensor, rate: float) -> Tensor:
        if w.ndim > 1 or not spares_vectors:
            scale = 0.02 * w.norm() / (g.norm() + 0.01 * w.norm())
            g = scale * (g + 0.01 * w)
        v.mul_(0.9).add_(g)
        return rate * v

    same(trained(job, world), by_hand(job, update))


def test_lars_steps_a_tensor_of_zeros(world: Team) -> None:
    layer = nn.Linear(2, 1)
    nn.init.zeros_(layer.weight)
    optimizer = build_optimizer(layer, tiny.recipe(optimizer={"name": "lars"}).optimizer)
    optimizer.param_groups[0]["lr"] = 1.0
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert layer.weight.isfinite().all() and (layer.weight != 0).all()


@pytest.mark.ranks(1, 2, 4)
def test_every_optimizer_on_several_ranks_is_that_on_one(world: Team) -> None:
    """On the same batches, in float64: equal but for the order of sums."""
    start, model = net(), net()
    matrices = {"groups": [{"match": "*.bias", "frozen": True}]}  # Muon trains nothing else
    with gradient_averaging(model, world, tiny.CPU) as average_gradients:
        for name in (*DEFAULTS, *torch_optimizers(), "own_optimizers:Odd"):
            fields = {"name": name, **(matrices if name == "Muon" else {})}
            recipe = Optimizer.model_validate(fields)
            alone = deepcopy(start)
            model.load_state_dict(start.state_dict())
            several = (model, world.rank, world.size, average_gradients)
            for trained, rank, ranks, average in (several, (alone, 0, 1, lambda: None)):
                optimizer = build_optimizer(trained, recipe)
                for step in range(5):
                    inputs, labels = whole_batch(step)
                    share = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
                    optimizer.zero_grad()
                    F.cross_entropy(trained(inputs[share]), labels[share]).backward()
                    average()
                    for group in optimizer.param_groups:
                        group["lr"] = 0.02
                    optimizer.step()
            # Muon orthogonalises in bfloat16
            rtol, atol = (0.02, 1e-3) if name == "Muon" else (1e-9, 1e-11)
            together, by_one = tiny.weights(model), tiny.weights(alone)
            assert torch.allclose(together, by_one, rtol=rtol, atol=atol), name
            assert not torch.equal(tiny.weights(model), tiny.weights(start)), name


def net() -> nn.Module:
    torch.manual_seed(5)
    layers = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    return layers.double()


def whole_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.rand(8, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (8,), generator=generator)


GROUPS = [
    {"match": "0.weight", "frozen": True},
    {"match": "4.weight", "learning_rate_scale": 0.5, "weight_decay": 0.2},
]


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "lamb", "decay_vectors": False},
        {"name": "adamw", "groups": GROUPS, "layer_decay": 0.5, "decay_vectors": False},
        {"name": "own_optimizers:Odd"},
        {"name": "own_optimizers:Noisy"},
    ],
    ids=["lamb", "groups", "own", "noisy"],
)
def test_a_phase_on_several_ranks_is_that_on_one(world: Team, optimizer: dict[str, Any]) -> None:
    job = tiny.job(optimizer=optimizer, large_batch={"learning_rate": 0.01})
    same(trained(job, world), trained(job, Team.alone()))


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulated_gradients_are_those_of_the_whole_batch(world: Team, parts: int) -> None:
    whole, cut = (tiny.job(large_batch={"accumulate": each}) for each in (1, parts))
    ranks = world.size
    if 24 % (parts * ranks):
        refused = rf"= 24 does not divide by its {ranks} ranks times .*accumulate = {parts}"
        with pytest.raises(UserError, match=refused):
            check_ranks(cut.recipe, ranks)
        return
    same(trained(cut, world), by_hand(whole, nesterov(5e-4)))


def test_batch_norm_sees_a_part(world: Team) -> None:
    """A share that is cut in two has the statistics that twice as many ranks would have."""
    job = tiny.job(
        model={"name": "tiny:batch_normed"},
        large_batch={"epochs": 1, "batchnorm_batch_size": 12 // world.size, "accumulate": 2},
    )
    phase = job.recipe.large_batch
    check_ranks(job.recipe, world.size)
    model = trained(job, world)
    assert model.get_buffer("1.num_batches_tracked") == 2 * job.steps(phase)
    if world.size > 1:  # the weights are compared on one rank only
        return
    expected = tiny.model(job)
    optimizer = build_optimizer(expected, job.recipe.optimizer)
    for step, (images, labels) in enumerate(job.training_batches(phase, KEY, Team.alone())):
        optimizer.param_groups[0]["lr"] = phase.rate(step / job.steps(phase))
        optimizer.zero_grad()
        for part in (slice(0, 12), slice(12, 24)):
            (F.cross_entropy(expected(images[part]), labels[part]) / 2).backward()
        optimizer.step()
    same(model, expected)
