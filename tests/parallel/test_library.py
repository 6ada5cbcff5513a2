"""A loop of one's own with the package's functions gives what `swap()` gives."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch

from swap_hpc.data import Batches, Dataset, Picks
from swap_hpc.data.sampling import Key, Phase, batchnorm_picks, training_picks
from swap_hpc.job import Job
from swap_hpc.ranks import Team, grid
from swap_hpc.swap import swap

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import plain_loop
import swap_loop

BATCHNORM = 1000  # the seed of the loop's batches for that


def read(samples: plain_loop.Samples, picks: Iterator[Picks], training: bool = True) -> Iterator[plain_loop.Samples]:
    return ((samples[0][pick.indices], samples[1][pick.indices]) for pick in picks)


def as_swap_has_them(samples: plain_loop.Samples, size: int, epochs: int, seed: int) -> Iterator[plain_loop.Samples]:
    number = len(samples[1])
    if seed == BATCHNORM:
        return read(samples, batchnorm_picks(0, number, number, size, 0, 1))
    key = Key(0, Phase.LARGE_BATCH) if seed == 0 else Key(0, Phase.REFINE, seed - 1)
    return read(samples, training_picks(key, number, size, 0, 1, range(epochs)))


@pytest.mark.ranks(1, 2, 4)
def test_the_examples_loop_gives_the_weights_of_swap(world: Team) -> None:
    ours = swap_loop.main(as_swap_has_them)
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
        for _ in swap(model, Job(recipe, dataset, tiny.CPU), ranks):
            pass
    untrained = plain_loop.build().state_dict()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], expected, rtol=1e-5, atol=1e-6, msg=name)
        if name.endswith("weight"):
            assert not torch.equal(expected, untrained[name])
