"""Augmented batches: the same samples and pixels on any number of ranks, and after a restart."""

from itertools import islice
from typing import Any

import pytest
import tiny
import torch

from swap_hpc.data.sampling import Key
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import Phase
from swap_hpc.train.job import Job

KEY = Key(3, Phase.REFINE, 1)
PLAIN = {"pad": 0, "flip": False, "cutout": 0}
AUGMENTS: list[dict[str, Any]] = [
    {"pad": 1, "flip": True, "cutout": 3, "mixup": 0.5, "cutmix": 1.0},
    {"crop_area": [0.3, 1.0], "flip": True, "cutout": 3, "erasing": 0.5, "mixup": 0.5},
    {"pad": 1, "flip": True, "randaugment": 2, "brightness": 0.4, "hue": 0.1, "saturation": 0.3},
    {"crop_area": [0.3, 1.0], "trivial_augment": True, "erasing": 0.5, "contrast": 0.4},
]


def job(augment: dict[str, Any]) -> Job:
    return tiny.job(
        augment=PLAIN | augment,
        large_batch={"batch_size": 24, "epochs": 3},
        batchnorm={"batch_size": 20, "samples": 90},
    )


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("augment", AUGMENTS)
def test_batches_do_not_depend_on_the_ranks_nor_on_where_training_begins(
    world: Team, augment: dict[str, Any]
) -> None:
    mine = job(augment)
    phase = mine.recipe.large_batch
    alone = list(mine.training_batches(phase, KEY, Team.alone()))
    shared = list(mine.training_batches(phase, KEY, world))
    resumed = mine.training_batches(phase, KEY, world, epoch=1, step=2)
    assert len(alone) == len(shared) == 12
    share = slice(world.rank * 24 // world.size, (world.rank + 1) * 24 // world.size)
    for (images, targets), (whole, all_targets) in zip(shared, alone, strict=True):
        assert torch.equal(images, whole[share]) and torch.equal(targets, all_targets[share])
    for one, other in zip(shared[6:], resumed, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("augment", AUGMENTS)
def test_batch_norm_sees_the_same_augmented_images_on_any_number_of_ranks(
    world: Team, augment: dict[str, Any]
) -> None:
    mine = job(augment)
    alone = list(mine.batchnorm_batches(Team.alone()))
    shared = list(mine.batchnorm_batches(world))
    for images, whole in zip(shared, islice(alone, world.rank, None, world.size), strict=True):
        assert torch.equal(images, whole)
    plain = next(job({}).batchnorm_batches(Team.alone()))
    assert not torch.equal(plain, alone[0])
