"""Inputs and targets in dictionaries and tuples train like tensors, on any number of ranks."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swap_hpc.average.agreement import weights_sha256
from swap_hpc.data import Batches, Dataset
from swap_hpc.data.sampling import Picks
from swap_hpc.parallel.grid import grid
from swap_hpc.parallel.teams import Team
from swap_hpc.swap import swap
from swap_hpc.train.evaluation import evaluate_job
from swap_hpc.train.events import Refreshed
from swap_hpc.train.job import Job

IMAGES = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(96) % 3


def as_tensors(picks: Iterator[Picks], training: bool) -> Iterator[Any]:
    for pick in picks:
        yield IMAGES[pick.indices], LABELS[pick.indices]


def as_nests(picks: Iterator[Picks], training: bool) -> Iterator[Any]:
    for images, labels in as_tensors(picks, training):
        yield {"left": images[..., :4], "more": (images[..., 4:], None)}, (labels, {})


class Joins(nn.Module):
    """Takes nested inputs, and makes of them what the model in it takes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Tensor:
        if isinstance(inputs, dict):
            inputs = torch.cat([inputs["left"], inputs["more"][0]], -1)
        logits: Tensor = self.model(inputs)
        return logits


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's own: a loss and a metric that take both kinds of targets."""

    def labels(targets: Any) -> Tensor:
        found: Tensor = targets[0] if isinstance(targets, tuple) else targets
        return found

    module: Any = ModuleType("nested_parts")
    module.loss = lambda outputs, targets: F.cross_entropy(outputs, labels(targets))
    module.right = lambda outputs, targets: outputs.argmax(1) == labels(targets)
    monkeypatch.setitem(sys.modules, "nested_parts", module)


@pytest.mark.ranks(1, 2)
def test_nested_batches_train_refresh_and_evaluate_like_tensors(world: Team, own: None) -> None:
    recipe = tiny.recipe(
        groups=world.size,
        loss="nested_parts:loss",
        metric="nested_parts:right",
        augment={"pad": 0, "flip": False, "cutout": 0},
        large_batch={"accumulate": 2},
        refine={"accumulate": 3},
    )
    ends = []
    with grid(world, world.size) as ranks:
        for function in (as_tensors, as_nests):
            split = Batches(96, function)
            dataset = Dataset(split, split, tuple("abc"))
            job = Job(recipe, dataset, tiny.CPU, make=lambda: Joins(tiny.normed(3, 3)))
            torch.manual_seed(0)
            for event in swap(job.build(), job, ranks):
                if isinstance(event, Refreshed):
                    test = evaluate_job(event.model, job, world)
                    ends.append((weights_sha256(event.model), test))
    assert len(ends) == 2 and ends[0] == ends[1]
