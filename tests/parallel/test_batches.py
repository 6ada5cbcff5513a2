"""Through DALI: the samples of a step do not depend on the ranks, and an epoch sees each at most once."""

import tiny
import torch

from swap_hpc.data.sampling import Key, Phase
from swap_hpc.ranks import Team


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


def test_an_epoch_sees_each_sample_at_most_once(world: Team) -> None:
    job = tiny.job(augment={"pad": 0, "flip": False, "cutout": 0})
    batches = list(job.training_batches(job.recipe.large_batch, Key(5, Phase.LARGE_BATCH), world))
    for epoch in (batches[:4], batches[4:]):
        images = [image for part in world.allgather(epoch) for batch, _ in part for image in batch]
        assert len({image.numpy().tobytes() for image in images}) == len(images) == 96


def test_batchnorm_batches_are_dealt_out(world: Team) -> None:
    job = tiny.job()  # 90 samples in batches of 20
    mine = list(job.batchnorm_batches(world))
    alone = list(job.batchnorm_batches(Team.alone()))
    parts = world.allgather(mine)
    assert [len(images) for images in alone] == [20] * 4
    for batch, images in enumerate(alone):
        assert torch.equal(parts[batch % world.size][batch // world.size], images)
