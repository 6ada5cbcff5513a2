"""Data in memory: the ranks of a node hold one copy, the same as a rank alone would."""

import errno
import gc
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from swap_hpc.data import Arrays, Dataset, load, one_copy
from swap_hpc.data.fields import check_fields
from swap_hpc.data.identity import Identity
from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel import shared_memory
from swap_hpc.parallel.grid import node_of
from swap_hpc.parallel.shared_memory import MIN_BYTES, Form, part_of, shared_arrays
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.augment import Augment
from swap_hpc.recipe.inputs import Data

PAD = 3
several_ranks = pytest.mark.ranks(2, 4)
also_torchrun = pytest.mark.process_groups(2)


@pytest.fixture
def shared_path(world: Team | None) -> Iterator[Path]:
    """A folder for all ranks."""
    if world is None:  # in the outer pytest
        yield Path()
        return
    path = Path(world.broadcast(tempfile.mkdtemp()))
    yield path
    world.barrier()
    if world.rank == 0:
        shutil.rmtree(path)


def draw_images(folder: Path, number: int, sizes: list[tuple[int, int]]) -> None:
    """Write noise, in two classes: `number` images to train on, and 7 to test on."""
    generator = np.random.Generator(np.random.Philox(3))
    for split, images in (("train", number), ("test", 7)):
        for i in range(images):
            width, height = sizes[i % len(sizes)]
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            path = folder / split / "ab"[i % 2] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def own_images(path: Path) -> Any:
    """Return grey images with a mask each, whose numbers are large enough to be shared."""
    generator = np.random.Generator(np.random.Philox(5))
    images = generator.integers(0, 256, (101, 64, 64, 1), dtype=np.uint8)
    split = Arrays(images, images[..., 0] // 100)
    return Dataset(split, split, ("dark", "bright"), channels=1)


def mapped_images(path: Path) -> Any:
    """Return images in a file, which may be larger than the memory."""
    images = np.load(path / "images.npy", mmap_mode="r")
    labels = np.arange(len(images)) % 2
    return (images, labels), (images[:9], labels[:9])


def kinds(folder: Path, world: Team, monkeypatch: pytest.MonkeyPatch) -> dict[str, Data]:
    """Return data of every kind, all but the small ones of more than 1 MiB."""
    own = ModuleType("own_data_set")
    own.images, own.mapped = own_images, mapped_images  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_data_set", own)
    one_size, sizes = folder / "one size", folder / "sizes"
    if world.rank == 0:
        draw_images(one_size, 45, [(96, 80)])
        draw_images(sizes, 30, [(120, 130), (90, 140)])
        np.save(folder / "images.npy", np.zeros((400, 32, 32, 3), np.uint8))
    world.barrier()
    return {
        "resized": Data(name="folder", path=sizes, image_size=((0, 128),)),
        "set aside": Data(name="folder", path=one_size, validation=11),
        "made": Data(name="synthetic", samples=400, validation=30),
        "own": Data(name="own_data_set:images", path=folder),
        "mapped": Data(name="own_data_set:mapped", path=folder),
        "small": Data(name="digits", validation=100),
    }


def arrays_of(data: Dataset) -> list[Arrays]:
    return [split for split in data.splits.values() if isinstance(split, Arrays)]


def check_equal(here: Dataset, alone: Dataset, kind: str) -> None:
    """All is equal to the bit: pixels, labels, statistics, hashes."""
    for field in ("classes", "image_size", "channels", "mean", "std", "notes"):
        assert getattr(here, field) == getattr(alone, field), (kind, field)
    assert Identity.of(here) == Identity.of(alone), kind
    assert list(here.splits) == list(alone.splits)
    for one, other in zip(arrays_of(here), arrays_of(alone), strict=True):
        assert np.array_equal(one.images, other.images), kind
        assert np.array_equal(one.labels, other.labels) and one.labels.dtype == other.labels.dtype
        assert (one.files, one.names, one.contents) == (other.files, other.names, other.contents)
        assert np.array_equal(one.padded(PAD), other.padded(PAD)), kind


@several_ranks
@also_torchrun
def test_all_is_what_one_rank_alone_has(
    world: Team, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, data in kinds(shared_path, world, monkeypatch).items():
        here = load(data, world, 1, PAD)
        check_equal(here, load(data, Team.alone(), 1, PAD), kind)
        train, *_ = arrays = arrays_of(here)
        if kind in ("mapped", "small"):
            assert mappings() == 0
            assert isinstance(train.images.base, np.memmap) == (kind == "mapped")
            continue
        assert mappings() > 0 and np.shares_memory(train.images, train.padded(PAD)), kind
        for array in (*(each.images for each in arrays), train.padded(PAD)):
            with pytest.raises(ValueError, match="WRITEABLE"):
                array.setflags(write=True)
        del here, train, arrays, array


def private_bytes() -> int:
    """Return the memory that this process has to itself."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


@several_ranks
@also_torchrun
def test_no_rank_holds_a_copy_of_its_own(world: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    def large(path: Path) -> Any:
        images = np.arange(2**26, dtype=np.uint8).reshape(1024, 256, 256, 1)
        return (images, np.arange(1024) % 2), (images[:9], np.arange(9) % 2)

    own = ModuleType("large_data_set")
    own.large = large  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "large_data_set", own)
    before = private_bytes()
    dataset = load(Data(name="large_data_set:large"), world, 1, PAD)
    frame = dataset.train.padded(PAD)  # type: ignore[union-attr]
    world.allgather(int(frame.sum()))  # all have read all of it
    assert private_bytes() - before < frame.nbytes / 4
    world.barrier()
    del dataset, frame
    assert mappings() == 0


def mappings() -> int:
    """Return how often this process maps shared data."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return len(re.findall("/memfd:swap_hpc|/dev/shm/swap_hpc-", maps))


@several_ranks
@also_torchrun
@pytest.mark.parametrize("damage", ["header", "pixels"])
def test_a_damaged_image_is_named_on_all_ranks(world: Team, shared_path: Path, damage: str) -> None:
    """It lies in the last rank's part."""
    bad = shared_path / "train" / "b" / "043.png"
    if world.rank == 0:
        draw_images(shared_path, 45, [(96, 80)])
        content = bad.read_bytes()
        bad.write_bytes(b"nothing" if damage == "header" else content[: len(content) // 2])
    world.barrier()
    for size in (None, ((0, 96),)):
        with pytest.raises(UserError, match=f"cannot decode the image {bad} ") as raised:
            load(Data(name="folder", path=shared_path, image_size=size), world, 1, PAD)
        assert len(set(world.allgather(str(raised.value)))) == 1


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let this process make no file larger than `size`, as `ulimit -f` does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def hide_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the other ranks a path that leads to another file there, or to none.

    So it is in containers with process numbers of their own.
    """

    def hidden() -> shared_memory._File:
        file = unnamed()
        return file._replace(path=f"/proc/self/fd/{file.descriptor}")

    unnamed = shared_memory._unnamed
    monkeypatch.setattr(shared_memory, "_unnamed", hidden)
    monkeypatch.setattr(shared_memory, "_in_dev_shm", hidden)


@several_ranks
@also_torchrun
@pytest.mark.parametrize("why", ["no room", "other containers"])
def test_where_ranks_cannot_share_each_has_its_own(
    world: Team, shared_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    chosen = kinds(shared_path, world, monkeypatch)
    if why == "other containers":
        hide_memory(monkeypatch)
    is_limited = why == "no room" and world.rank == 0
    for kind in ("set aside", "made", "own"):
        alone = load(chosen[kind], Team.alone(), 1, PAD)
        with files_of_at_most(2**16 if is_limited else resource.RLIM_INFINITY):
            here = load(chosen[kind], world, 1, PAD)
        *notes, line = here.notes
        assert "each rank holds the images for itself, " in line
        assert ("--ipc=host" in line) == (why == "other containers")
        assert ("File too large: raise ulimit -f" in line) == (why == "no room")
        assert notes == list(alone.notes)
        assert mappings() == 0
        for one, other in zip(arrays_of(here), arrays_of(alone), strict=True):
            assert np.array_equal(one.images, other.images) and one.contents == other.contents


def check_refusals(error: int, hint: bool) -> None:
    """Where the others cannot open the unnamed file, /dev/shm counts; otherwise it does not."""
    for unnamed in (errno.ENOENT, errno.EACCES, errno.ENOSYS):
        assert ("--shm-size" in shared_memory._reason(unnamed, error)) == hint
    for unnamed in (errno.EFBIG, errno.ENOMEM, errno.ENOSPC):
        assert shared_memory._reason(unnamed, error).startswith(os.strerror(unnamed))


def test_containers_are_to_change_only_where_dev_shm_is_the_reason() -> None:
    for error in (errno.ENOSPC, errno.ENOENT, errno.EACCES):
        check_refusals(error, hint=True)
    for error in (errno.EFBIG, errno.ENOMEM):
        check_refusals(error, hint=False)


@several_ranks
@also_torchrun
def test_small_labels_do_not_make_images_large(world: Team) -> None:
    """The images take less than 1 MiB, and more with their labels."""
    data = Data(name="synthetic", samples=4300, image_size=((0, 8),))
    here = load(data, world, 1)
    arrays = arrays_of(here)
    images, labels = (
        sum(getattr(each, name).nbytes for each in arrays) for name in ("images", "labels")
    )
    assert images < MIN_BYTES <= images + labels
    check_equal(here, load(data, Team.alone(), 1), "small images")
    assert mappings() == 0


@several_ranks
@also_torchrun
@pytest.mark.parametrize(
    ("module", "name", "rank"),
    [(one_copy, "_outlined", 0), (one_copy, "reflect_", 1), (shared_memory, "_opened", 1)],
)
def test_an_error_on_one_rank_of_a_node_ends_all(
    world: Team, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, rank: int
) -> None:
    def failing(*arguments: Any) -> None:
        raise MemoryError("out of memory")

    if world.rank == rank:
        monkeypatch.setattr(module, name, failing)
    with pytest.raises(RunError, match="out of memory"):
        load(Data(name="synthetic", samples=400), world, 1, PAD)


@several_ranks
@also_torchrun
def test_padding_that_will_be_refused_takes_no_memory(
    world: Team, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = kinds(shared_path, world, monkeypatch)
    for kind in ("set aside", "made", "own"):
        with files_of_at_most(2**24):  # without padding all fit
            here = load(chosen[kind], world, 1, 400)
        assert mappings() > 0 and not here.notes, kind
        with pytest.raises(UserError, match="augment.pad = 400 .* do not fit"):
            check_fields(chosen[kind], Augment(pad=400), here)
        del here


@several_ranks
@also_torchrun
@pytest.mark.parametrize("make", [shared_memory._unnamed, shared_memory._in_dev_shm])
def test_either_memory_is_shared_and_leaves_nothing_behind(
    world: Team, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    other = {shared_memory._unnamed, shared_memory._in_dev_shm} - {make}
    for name in (each.__name__ for each in other):
        monkeypatch.setattr(shared_memory, name, lambda: make())
    number = 5 * 2**17 + 3
    with node_of(world) as node:
        memory = shared_arrays(node, {"one": Form((number,), "int64"), "two": Form((9,), "u1")})
        assert memory.team.size == node.size and not memory.refused
        mine = part_of(number, node)
        memory.arrays["one"][mine.start : mine.stop] = mine
        memory.arrays["two"][part_of(9, node).start :] = node.rank
        found = memory.finished()
        assert np.array_equal(found["one"], np.arange(number))
        ends = [9 * (rank + 1) // node.size for rank in range(node.size)]
        del memory
        node.barrier()
    assert len(ends) == node.size and mappings() > 0
    assert not list(Path("/dev/shm").glob("swap_hpc-*"))
    del found
    assert mappings() == 0
