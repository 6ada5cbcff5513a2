"""Clipped and loss-scaled steps of ranks are those of a plain loop of torch on one rank."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils.clip_grad import clip_grad_norm_

from swap_hpc.data.sampling import Key
from swap_hpc.data.seeding import seed_all
from swap_hpc.errors import Diverged
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1, Phase
from swap_hpc.train import precision
from swap_hpc.train.events import Epoch
from swap_hpc.train.fit import fit
from swap_hpc.train.job import Job

KEY = Key(0, Phase.LARGE_BATCH)

FP16: dict[str, Any] = {"precision": "fp16", "loss": "zoo:spiky_loss"}


@dataclass
class Trained:
    """A model, and what each step or epoch of its training told."""

    model: nn.Module
    epochs: list[Epoch] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # of all steps
    scales: list[float] = field(default_factory=list)  # after each step
    lone_spikes: int = 0  # steps in which the gradients of some ranks overflowed, not those of all


def trained(job: Job, world: Team) -> Trained:
    done = Trained(tiny.model(job))
    for event in fit(done.model, job, PHASE_1, world):
        if isinstance(event, Epoch):
            done.epochs.append(event)
    return done


def member(rank: int, size: int) -> Team:
    """Return a team for the sampler, which only asks for the place of a rank."""
    team = Team.alone()
    team.rank, team.size = rank, size
    return team


def by_hand(job: Job, ranks: int) -> Trained:
    """Train phase 1 with torch alone, in one process that computes each rank's share in turn."""
    done, phase, recipe = Trained(tiny.model(job)), job.recipe.large_batch, job.recipe
    parts = phase.accumulate
    sgd = torch.optim.SGD(
        done.model.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    scales = recipe.precision == "fp16"
    scaler = GradScaler(
        "cpu",
        init_scale=precision.FIRST_SCALE,
        growth_interval=precision.GROWTH_INTERVAL,
        enabled=scales,
    )
    shares = [job.training_batches(phase, KEY, member(rank, ranks)) for rank in range(ranks)]
    for step, batches in enumerate(zip(*shares, strict=True)):
        sgd.param_groups[0]["lr"] = phase.rate(step / job.steps(phase))
        losses, gradients = [], []
        for rank, (images, labels) in enumerate(batches):
            seed_all(KEY.torch_seed(step, rank))
            sgd.zero_grad()
            for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
                with torch.autocast("cpu", torch.float16, enabled=scales):
                    outputs = done.model(x)
                losses.append(job.objective.loss(outputs.float(), y))
                scaler.scale(losses[-1] / parts).backward()
            gradients.append([p.grad for p in done.model.parameters()])
        for p, of_ranks in zip(done.model.parameters(), zip(*gradients, strict=True), strict=True):
            p.grad = torch.stack(of_ranks).sum(0) / ranks
        spikes = torch.tensor(losses).view(ranks, parts).amax(1) > 1000
        done.lone_spikes += bool(spikes.any() and not spikes.all())
        scaler.unscale_(sgd)
        if recipe.optimizer.clip_norm is not None:
            norm = clip_grad_norm_(done.model.parameters(), recipe.optimizer.clip_norm)
            done.norms.append(norm.item())
        scaler.step(sgd)
        scaler.update()
        done.scales.append(scaler.get_scale())
    return done


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("parts", [1, 3])
def test_clipping_is_that_of_the_whole_batch_on_one_rank(world: Team, parts: int) -> None:
    if 24 % (parts * world.size):
        parts = 2
    job = tiny.job(optimizer={"clip_norm": 0.9}, large_batch={"epochs": 3, "accumulate": parts})
    found, expected = trained(job, world), by_hand(job, 1)
    torch.testing.assert_close(
        tiny.weights(found.model), tiny.weights(expected.model), rtol=1e-4, atol=1e-6
    )
    steps = job.steps(job.recipe.large_batch)
    for number, epoch in enumerate(found.epochs):
        norms = expected.norms[number * steps : (number + 1) * steps]
        assert epoch.updates.taken == steps and epoch.updates.loss_scale is None
        assert epoch.updates.mean_norm == pytest.approx(sum(norms) / steps, rel=1e-4)
        assert epoch.updates.largest_norm == pytest.approx(max(norms), rel=1e-4)
        assert epoch.updates.clipped == sum(norm > 0.9 for norm in norms)
    clipped = sum(epoch.updates.clipped for epoch in found.epochs)
    assert 0 < clipped < 3 * steps
    assert len(set(world.allgather(tuple(epoch.updates for epoch in found.epochs)))) == 1


@pytest.mark.ranks(1, 2)
def test_fp16_is_torchs_loop_with_its_loss_scaling(
    world: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; the first steps overflow, then some of single ranks."""
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**22)
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 3)
    job = tiny.job(**FP16, optimizer={"clip_norm": 0.9}, large_batch={"epochs": 8, "accumulate": 2})
    found, expected = trained(job, world), by_hand(job, world.size)
    assert torch.equal(tiny.weights(found.model), tiny.weights(expected.model))
    changes = [b / a for a, b in zip([2.0**22, *expected.scales], expected.scales, strict=False)]
    assert changes[0] == 0.5 and 2.0 in changes
    assert world.size == 1 or expected.lone_spikes
    steps = job.steps(job.recipe.large_batch)
    for number, epoch in enumerate(found.epochs):
        part = slice(number * steps, (number + 1) * steps)
        skipped = [change < 1 for change in changes[part]]
        assert epoch.updates.skipped == sum(skipped)
        assert epoch.updates.taken == steps - sum(skipped)
        assert epoch.updates.loss_scale == expected.scales[part][-1]
        norms = [n for n, skips in zip(expected.norms[part], skipped, strict=True) if not skips]
        assert epoch.updates.clipped == sum(norm > 0.9 for norm in norms)
        assert epoch.updates.largest_norm == max(norms, default=0.0)
    assert all(p.dtype == torch.float32 for p in found.model.parameters())


@pytest.mark.ranks(1, 2)
def test_a_fused_optimizer_skips_its_first_steps_too(
    world: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**22)
    jobs = [tiny.job(**FP16, optimizer={"fused": fused}) for fused in (True, False)]
    found, expected = (trained(job, world) for job in jobs)
    assert found.epochs[0].updates.skipped == expected.epochs[0].updates.skipped > 0
    torch.testing.assert_close(
        tiny.weights(found.model), tiny.weights(expected.model), rtol=1e-2, atol=1e-3
    )


@pytest.mark.ranks(1, 2)
def test_gradients_that_overflow_at_every_scale_end_the_run(
    world: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "FIRST_SCALE", 4.0)
    job = tiny.job(precision="fp16", loss="zoo:huge_loss")
    message = "gradients overflow float16 at a loss scale of 1 in large_batch, epoch 1, step 3"
    with pytest.raises(Diverged, match=f"{message}.*set precision to bf16 or fp32"):
        trained(job, world)
