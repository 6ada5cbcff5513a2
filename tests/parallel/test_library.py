"""A user's own loop with the package's functions gives what `swap()` gives."""

import sys
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import swap_hpc
from swap_hpc.data import Batches, Dataset, Picks
from swap_hpc.data.sampling import Key, batchnorm_picks, training_picks
from swap_hpc.parallel.grid import grid
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import Phase
from swap_hpc.swap import swap
from swap_hpc.train.job import Job

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import plain_loop
import swap_loop

BATCHNORM = 1000  # the seed with which the loop asks for batch norm's batches


def read(
    samples: plain_loop.Samples, picks: Iterator[Picks], training: bool = True
) -> Iterator[plain_loop.Samples]:
    return ((samples[0][pick.indices], samples[1][pick.indices]) for pick in picks)


def batches_of_swap(
    samples: plain_loop.Samples, size: int, epochs: int, seed: int
) -> Iterator[plain_loop.Samples]:
    """Yield the batches that `swap()` has where the example's loop asks for some with a seed."""
    number = len(samples[1])
    if seed == BATCHNORM:
        return read(samples, batchnorm_picks(0, number, number, size, 0, 1))
    key = Key(0, Phase.LARGE_BATCH) if seed == 0 else Key(0, Phase.REFINE, seed - 1)
    return read(samples, training_picks(key, number, size, 0, 1, range(epochs)))


@pytest.mark.ranks(1, 2, 4)
def test_the_examples_loop_gives_the_weights_of_swap(world: Team) -> None:
    found = swap_loop.main(batches_of_swap)
    train, test = plain_loop.load()
    first, second = (Batches(len(split[1]), partial(read, split)) for split in (train, test))
    dataset = Dataset(first, second, classes=tuple("0123456789"), channels=1)
    recipe = tiny.recipe(
        groups=world.size,
        large_batch={"batch_size": 200, "epochs": 10, "learning_rate": [[0, 0.2], [10, 0.0]]},
        refine={"batch_size": 40, "epochs": 3, "learning_rate": [[0, 0.05], [3, 0.0]]},
        batchnorm={"batch_size": 200, "samples": 1200},
        evaluate={"batch_size": 100},
    )
    torch.manual_seed(0)
    model = plain_loop.build()
    with grid(Team.alone(), world.size) as ranks:
        for _ in swap(model, Job(recipe, dataset, tiny.CPU, make=plain_loop.build), ranks):
            pass
    untrained = plain_loop.build().state_dict()
    for name, expected in model.state_dict().items():
        own = found.state_dict()[name]
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6, msg=name)
        if name.endswith("weight"):
            assert not torch.equal(expected, untrained[name])


@pytest.mark.ranks(1, 3)
def test_a_batch_may_be_whatever_forward_takes(world: Team) -> None:
    """Batches are dictionaries here, for a model with two inputs."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.norm(left + right)

    torch.manual_seed(0)
    batches = [{"left": torch.randn(4, 2), "right": torch.randn(4, 2) + 3} for _ in range(6)]
    mine = batches[world.rank :: world.size]
    model = Both()
    swap_hpc.refresh_batchnorm_(model, mine, world, forward=lambda model, batch: model(**batch))
    together = torch.cat([batch["left"] + batch["right"] for batch in batches]).double()
    mean, variance = together.mean(0).float(), together.var(0).float()
    torch.testing.assert_close(model.norm.running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.norm.running_var, variance, rtol=1e-5, atol=1e-6)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("trainer", ["DistributedDataParallel", "Horovod"])
def test_the_first_phase_may_be_another_trainers(world: Team, trainer: str) -> None:
    """After it each rank continues alone, and their average equals a mean computed by hand.

    Nothing that the trainer leaves is in the way.
    """
    torch.manual_seed(0)
    model = plain_loop.build()
    (images, labels), (test_images, test_labels) = plain_loop.load()
    mine = slice(world.rank, 64, world.size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(forward: nn.Module) -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(images[mine]), labels[mine]).backward()
        optimizer.step()

    if trainer == "Horovod":
        import horovod.torch as hvd

        hvd.init(world.comm)
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
        step(model)
        hvd.shutdown()
        model = deepcopy(model)  # without Horovod's hooks
    else:
        method = f"file://{unused_file(world)}"
        torch.distributed.init_process_group(
            "gloo", init_method=method, rank=world.rank, world_size=world.size
        )
        wrapped = nn.parallel.DistributedDataParallel(model)
        step(wrapped)
        check_refused(wrapped, world, r"average the module in it, model\.module")
        check_refused(sharded(deepcopy(model)), world, "the model's weights are sharded over ranks")
        torch.distributed.destroy_process_group()
    shared = [parameter.detach().clone() for parameter in model.parameters()]
    sums = [weights.sum().item() for weights in shared]
    assert all(others == sums for others in world.allgather(sums))
    plain_loop.train(model, iter([(images[mine], labels[mine])]), rate=0.1)
    everyones = [world.allgather(parameter.detach().numpy()) for parameter in model.parameters()]
    swap_hpc.average_weights_(model, world)
    for parameter, before, each in zip(model.parameters(), shared, everyones, strict=True):
        total = sum(weights.astype("float64") for weights in each)
        mean = torch.from_numpy(total / world.size).float()
        assert torch.equal(parameter.detach(), mean)
        assert not torch.equal(mean, before)
    share = slice(world.rank, None, world.size)
    found = swap_hpc.evaluate(model, [(test_images[share], test_labels[share])], world)
    expected = plain_loop.accuracy(model, (test_images, test_labels))
    assert found.accuracy == pytest.approx(expected, abs=1e-6)


def unused_file(world: Team) -> str:
    """Return the path of a file for all ranks, which does not exist yet."""
    return world.broadcast(tempfile.mktemp(prefix="ddp-"))


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)
    return model


def check_refused(wrapped: nn.Module, world: Team, why: str) -> None:
    """Through the wrapper, a rank with more batches than another would wait forever."""
    (images, labels), _ = plain_loop.load()
    batches = [(images[:8], labels[:8])] * (1 + world.rank)
    for function in (
        lambda: swap_hpc.average_weights_(wrapped, world),
        lambda: swap_hpc.WeightSum().add_(wrapped),
        lambda: swap_hpc.refresh_batchnorm_(wrapped, (images for images, _ in batches), world),
        lambda: swap_hpc.evaluate(nn.Sequential(wrapped), batches, world),
    ):
        with pytest.raises(ValueError, match=why):
            function()
