"""Images that are read and decoded in every epoch, from a folder and from its shards.

The generated set is shaped like ImageNet.
"""

import ctypes
import resource
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import imagenet_like
import pytest
import tiny
import torch

from swap_hpc.data import load
from swap_hpc.data.pack import pack
from swap_hpc.data.sampling import Key
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import Phase
from swap_hpc.train.job import Job

SIZES = [[0, 32], [1, 48], [2, 64]]
M_MMAP_THRESHOLD = -3  # an option of mallopt, from glibc's malloc.h
IMAGES = 1000  # training images: one of each class


@pytest.fixture(scope="module")
def paths() -> Iterator[dict[str, Path]]:
    """The set as a folder and as shards, which all ranks pack."""
    team = Team.world()
    with tempfile.TemporaryDirectory() as name:
        root = Path(team.broadcast(name))
        team.first(lambda: imagenet_like.make(root / "folder", train=1))
        pack(root / "folder", root / "webdataset", 70, team, lambda text: None)
        yield {kind: root / kind for kind in ("folder", "webdataset")}
        team.agree(lambda: None)


def job(path: Path, team: Team, sizes: list[list[int]] = SIZES, epochs: int = 2) -> Job:
    recipe = tiny.recipe(
        data={"name": path.name, "path": str(path), "image_size": sizes, "memory_gib": 0},
        augment={"pad": 0, "flip": True, "cutout": 4, "crop_area": [0.08, 1.0]},
        large_batch={"epochs": epochs, "batch_size": 200, "learning_rate": 0.1},
        refine={"epochs": 2, "batch_size": 40, "learning_rate": 0.1},
        batchnorm={"batch_size": 64, "samples": 128},
        evaluate={"batch_size": 64},
    )
    return Job(recipe, load(recipe.data, team, 1), tiny.CPU)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.mark.ranks(1, 2, 4)
def test_an_epoch_sees_each_image_once_on_any_number_of_ranks(
    world: Team, paths: dict[str, Path]
) -> None:
    """Folder and shards also give the same pixels, in the order of one rank alone."""
    of_folder, of_shards = job(paths["folder"], world), job(paths["webdataset"], world)
    phase, key = of_folder.recipe.large_batch, Key(0, Phase.LARGE_BATCH)
    files = of_folder.training_batches(phase, key, world)
    shards = of_shards.training_batches(phase, key, world)
    alone = of_folder.training_batches(phase, key, Team.alone())
    orders = []
    for pixels in (32, 48):
        seen: list[int] = []
        for _ in range(IMAGES // 200):
            images, labels = next(files)
            packed, packed_labels = next(shards)
            assert images.shape == (200 // world.size, 3, pixels, pixels)
            assert torch.equal(images, packed) and torch.equal(labels, packed_labels)
            whole, whole_labels = next(alone)
            mine = slice(world.rank * len(images), (world.rank + 1) * len(images))
            assert torch.equal(images, whole[mine]) and torch.equal(labels, whole_labels[mine])
            for part in world.allgather(labels.tolist()):
                seen += part
        assert Counter(seen) == Counter(range(IMAGES))  # one image of each class
        orders.append(seen)
    assert orders[0] != orders[1]
    assert next(files, None) is None and next(shards, None) is None


@pytest.mark.ranks(2)
def test_sizes_continue_in_the_refinement_and_evaluation_takes_the_last(
    world: Team, paths: dict[str, Path]
) -> None:
    small = job(paths["webdataset"], world, [[0, 24], [1, 32], [3, 40]])
    recipe, key = small.recipe, Key(0, Phase.REFINE, 1)
    refinement = small.training_batches(recipe.refine, key, world, epoch=0, step=20)
    # epochs 2 and 3 of the run, the first one from step 20 of 25
    assert [images.shape[-1] for images, _ in refinement] == [32] * 5 + [40] * 25
    assert {images.shape[-1] for images, _ in small.test_batches(world)} == {40}
    assert {images.shape[-1] for images in small.batchnorm_batches(world)} == {40}
    data = recipe.data.model_copy(update={"evaluation_size": 56})
    wide = replace(small, recipe=recipe.model_copy(update={"data": data}))
    assert {images.shape[-1] for images, _ in wide.test_batches(world)} == {56}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_memory_stays_flat_over_epochs(world: Team, paths: dict[str, Path], kind: str) -> None:
    """Over 17 epochs with evaluations between them.

    Each epoch has another image size than the one before, and so another pipeline.
    """
    # freed memory returns to the system, so that the memory left is in use
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 17)
    sizes = [[epoch, (32, 64)[epoch % 2]] for epoch in range(17)]
    mine = job(paths[kind], world, sizes, 17)
    batches = mine.training_batches(mine.recipe.large_batch, Key(0, Phase.LARGE_BATCH), world)
    used = []
    for step, _ in enumerate(batches, 1):
        if step % 5 == 0:
            assert sum(len(labels) for _, labels in mine.test_batches(world)) > 0
            used.append(resident_mib())
    assert len(used) == 17
    # the minima: single readings differ by 16 MiB
    grown = min(used[11:]) - min(used[1:7])
    assert grown < 30, f"grew by {grown:.0f} MiB over ten epochs: {[round(each) for each in used]}"
