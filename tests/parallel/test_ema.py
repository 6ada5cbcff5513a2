"""The moving average of the weights is torch's, on any number of ranks and for any tensors."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import tiny
import torch
import zoo
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from swap_hpc.average.agreement import hashed
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1
from swap_hpc.train import team_check
from swap_hpc.train.control import Control
from swap_hpc.train.ema import MovingAverage
from swap_hpc.train.evaluation import evaluate_job
from swap_hpc.train.events import Epoch, SavePoint
from swap_hpc.train.fit import fit
from swap_hpc.train.job import Job

DECAY = 0.7


def floating(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in state.items() if t.is_floating_point()}


def torchs(job: Job, world: Team) -> tuple[list[Epoch], SavePoint, AveragedModel]:
    """Train phase 1; torch's average takes in the weights and buffers after each step.

    At the end of an epoch those buffers are the ranks' mean already.
    """
    model = tiny.model(job)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    epochs, point = [], None
    for event in fit(model, job, PHASE_1, world):
        if isinstance(event, Epoch):
            epochs.append(event)
        else:
            point = event
            # its first call copies the weights at the beginning
            average.update_parameters(model)
    assert point
    return epochs, point, average


@pytest.mark.ranks(1, 2)
def test_it_is_torchs_average_after_every_step(
    world: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(team_check, "CHECK_SECONDS", 0.0)
    job = tiny.job(model={"name": "tiny:batch_normed"}, large_batch={"ema": DECAY, "epochs": 3})
    job = replace(job, control=Control(save_seconds=0.0))  # a save point after every step
    epochs, point, average = torchs(job, world)
    found, expected = floating(point.ema_state), floating(average.module.state_dict())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        mean = torch.stack(world.allgather(tensor)).double().mean(0).float()
        if world.size == 1:
            assert torch.equal(found[name], mean), name
        torch.testing.assert_close(found[name], mean, rtol=1e-5, atol=1e-7)
    assert point.ema_state["1.num_batches_tracked"] == 3 * job.steps(job.recipe.large_batch)
    assert len(set(world.allgather(hashed(point.ema_state).hexdigest()))) == 1
    average.module.load_state_dict(point.ema_state)
    assert epochs[-1].ema == {"test": evaluate_job(average.module, job, world)}
    assert epochs[-1].ema["test"] != epochs[-1].test


def half(classes: int, channels: int) -> nn.Module:
    return zoo.Net(classes, channels).bfloat16()


def channels_last(classes: int, channels: int) -> nn.Module:
    return zoo.Net(classes, channels).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "build", [half, channels_last, zoo.Complex, zoo.Seeing, zoo.pruned, zoo.old_weight_norm]
)
@torch.no_grad()
def test_tensors_of_any_kind_are_averaged_and_given_back(
    build: Callable[[int, int], nn.Module],
) -> None:
    model = build(3, 3)
    average = MovingAverage(model, 0.99)
    tensors = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    expected = {name: t.clone().to(torch.complex128) for name, t in tensors.items()}
    for _ in range(5):
        for name, tensor in tensors.items():
            tensor.add_(1)
            if name in average.averages:
                expected[name] = 0.99 * expected[name] + 0.01 * tensor.to(torch.complex128)
        average.update_(model)
    own = {name: t.clone() for name, t in tensors.items()}
    with average.in_place_of(model):
        for name, averaged in average.averages.items():
            torch.testing.assert_close(
                averaged.to(torch.complex128), expected[name], rtol=1e-5, atol=1e-6
            )
            assert torch.equal(model.state_dict()[name], averaged.to(tensors[name].dtype))
    for name, tensor in own.items():
        assert torch.equal(model.state_dict()[name], tensor), name
        assert name in average.averages or not tensor.is_floating_point()
