"""Batches on several ranks: a step's samples do not depend on them, an epoch has each once."""

import random
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from swap_hpc.data import Batches, Dataset, load
from swap_hpc.data.dataset import with_validation
from swap_hpc.data.sampling import Key
from swap_hpc.data.splits import Files
from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import Phase
from swap_hpc.train.job import Job


def test_a_step_holds_the_same_pixels_on_any_number_of_ranks(world: Team) -> None:
    job = tiny.job()
    key = Key(5, Phase.LARGE_BATCH)
    mine = list(job.training_batches(job.recipe.large_batch, key, world))
    alone = list(job.training_batches(job.recipe.large_batch, key, Team.alone()))
    assert len(mine) == len(alone) == 2 * (101 // 24)
    for step, (images, labels) in enumerate(alone):
        parts = world.allgather(mine[step])
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)


class Shaken(torch.utils.data.Dataset[Any]):
    """A data set that draws from all global generators, in training; or as it is."""

    def __init__(self, shaken: bool = True):
        self.shaken = shaken

    def __len__(self) -> int:
        return 101

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()])
        return index + self.shaken * noise, index % 3


def test_a_torch_data_set_gives_the_same_on_any_number_of_ranks(world: Team) -> None:
    split = Batches.of(Shaken(), evaluated=Shaken(shaken=False))
    whole = Dataset(split, split, tuple("abc"))
    job = Job(tiny.recipe(), with_validation(whole, 30), tiny.CPU)
    key = Key(5, Phase.LARGE_BATCH)
    mine = list(job.training_batches(job.recipe.large_batch, key, world))
    alone = list(job.training_batches(job.recipe.large_batch, key, Team.alone()))
    inputs = [batch for batch, _ in alone]
    assert len(inputs) == 2 * (71 // 24)
    for step, expected in enumerate(inputs):
        parts = world.allgather(mine[step][0])
        assert torch.equal(torch.cat(parts), expected)
    assert len(torch.cat(inputs).unique()) > 0.9 * 3 * len(torch.cat(inputs))
    found = torch.cat([batch for batch, _ in job.test_batches(Team.alone(), "validation")])
    assert len(found) == 30 and torch.equal(found, found.long().float())  # without noise


def test_an_epoch_sees_each_sample_at_most_once(world: Team) -> None:
    job = tiny.job(augment={"pad": 0, "flip": False, "cutout": 0})
    batches = list(job.training_batches(job.recipe.large_batch, Key(5, Phase.LARGE_BATCH), world))
    for epoch in (batches[:4], batches[4:]):
        mine = torch.cat([images for images, _ in epoch])
        images = torch.cat(world.allgather(mine))
        assert len({image.numpy().tobytes() for image in images}) == len(images) == 96


def test_batchnorm_batches_are_dealt_out(world: Team) -> None:
    job = tiny.job()  # 90 samples in batches of 20
    mine = list(job.batchnorm_batches(world))
    alone = list(job.batchnorm_batches(Team.alone()))
    parts = world.allgather(mine)
    assert [len(images) for images in alone] == [20] * 4
    for batch, images in enumerate(alone):
        assert torch.equal(parts[batch % world.size][batch // world.size], images)


def test_ranks_whose_data_differ_are_refused(world: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ModuleType("own_split")
    images, labels = np.zeros((6, 8, 8, 3), np.uint8), np.arange(6) % 3
    monkeypatch.setitem(sys.modules, "own_split", own)
    data = tiny.recipe(data={"name": "own_split:load"}).data
    own.load = lambda path: ((images, labels), (images, labels))  # type: ignore[attr-defined]
    assert len(load(data, world, 1).train) == 6
    reordered = np.roll(labels, world.rank)
    own.load = lambda path: ((images, reordered), (images, labels))  # type: ignore[attr-defined]
    numbers = "6 training and 6 test samples, rank 0 has 6 and 6, maybe in another order"
    message = rf"rank 1 has other data than rank 0 \({numbers}\): give all nodes"
    if world.size > 1:
        with pytest.raises(UserError, match=message):
            load(data, world, 1)


def test_files_are_the_same_wherever_a_node_keeps_them() -> None:
    def files(*paths: str) -> Files:
        return Files(paths, np.zeros(len(paths), np.int64))

    one = files("/a/x/1.png", "/a/x/2.png")
    elsewhere = files("/b/c/x/1.png", "/b/c/x/2.png")
    another = files("/a/x/1.png", "/a/x/3.png")
    assert one.contents == elsewhere.contents
    assert one.contents != another.contents
