"""Images that are read and decoded in every epoch, from folders and from shards, on a generated set that is shaped like ImageNet."""

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
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
IMAGES = 1000  # for training: one of each class


@pytest.fixture(scope="module")
def paths() -> Iterator[dict[str, Path]]:
    """The set as a folder and as shards, which all ranks packed."""
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
        large_batch={"epochs": epochs, "batch_size": 200, "learning_rate": 0.1},
        refine={"epochs": 2, "batch_size": 40, "learning_rate": 0.1},
        batchnorm={"batch_size": 64, "samples": 128},
        evaluate={"batch_size": 64},
    )
    return Job(recipe, load(recipe.data, team, 1), tiny.CPU)


def _resident_mib() -> float:
    return (
        int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        * resource.getpagesize()
        / 2**20
    )


@pytest.mark.ranks(1, 2, 4)
def test_an_epoch_sees_each_image_once_on_any_number_of_ranks(
    world: Team, paths: dict[str, Path]
) -> None:
    """And the same pixels from a folder and from its shards, in the order of one rank alone."""
    orders = []
    jobs = [job(path, world) for path in paths.values()]
    streams = [
        each.training_batches(each.recipe.large_batch, Key(0, Phase.LARGE_BATCH), world)
        for each in jobs
    ]
    alone = jobs[0].training_batches(
        jobs[0].recipe.large_batch, Key(0, Phase.LARGE_BATCH), Team.alone()
    )
    for pixels in (32, 48):
        seen: list[int] = []
        for _ in range(IMAGES // 200):
            (images, labels), (packed, packed_labels) = (next(stream) for stream in streams)
            assert images.shape == (200 // world.size, 3, pixels, pixels)
            assert torch.equal(images, packed) and torch.equal(labels, packed_labels)
            whole, whole_labels = next(alone)
            mine = slice(world.rank * len(images), (world.rank + 1) * len(images))
            assert torch.equal(images, whole[mine]) and torch.equal(labels, whole_labels[mine])
            seen += [label for part in world.allgather(labels.tolist()) for label in part]
        assert Counter(seen) == Counter(range(IMAGES))  # one image of each class
        orders.append(seen)
    assert orders[0] != orders[1]
    assert all(next(stream, None) is None for stream in streams)


@pytest.mark.ranks(2)
def test_sizes_go_on_through_the_refinement_and_evaluation_takes_the_last(
    world: Team, paths: dict[str, Path]
) -> None:
    small = job(paths["webdataset"], world, [[0, 24], [1, 32], [3, 40]])
    refinement = small.training_batches(
        small.recipe.refine, Key(0, Phase.REFINE, 1), world, epoch=0, step=20
    )
    assert [images.shape[-1] for images, _ in refinement] == [32] * 5 + [
        40
    ] * 25  # epochs 2 and 3 of the run
    assert {images.shape[-1] for images, _ in small.test_batches(world)} == {40}
    assert {images.shape[-1] for images in small.batchnorm_batches(world)} == {40}
    wide = replace(
        small,
        recipe=small.recipe.model_copy(
            update={"data": small.recipe.data.model_copy(update={"evaluation_size": 56})}
        ),
    )
    assert {images.shape[-1] for images, _ in wide.test_batches(world)} == {56}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_memory_stays_flat_over_epochs(world: Team, paths: dict[str, Path], kind: str) -> None:
    """Through 17 epochs, each with another size, and so another pipeline, than the one before; evaluations between them."""
    ctypes.CDLL("libc.so.6").mallopt(
        M_MMAP_THRESHOLD, 1 << 17
    )  # what is freed leaves the process, so that what stays is in use
    mine = job(paths[kind], world, [[epoch, (32, 64)[epoch % 2]] for epoch in range(17)], 17)
    used = []
    for step, _ in enumerate(
        mine.training_batches(mine.recipe.large_batch, Key(0, Phase.LARGE_BATCH), world), 1
    ):
        if step % 5 == 0:
            assert sum(len(labels) for _, labels in mine.test_batches(world)) > 0
            used.append(_resident_mib())
    assert len(used) == 17
    grown = min(used[11:]) - min(
        used[1:7]
    )  # the least: what is held when it is read differs by 16 MiB
    assert grown < 30, f"grew by {grown:.0f} MiB over ten epochs: {[round(each) for each in used]}"
