"""Decoding takes memory by the pixel, not by the batch, and pieces do not change the result."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import imagenet_like
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from swap_hpc.data import load, loader
from swap_hpc.data.dataset import Dataset
from swap_hpc.data.decode import decode, image_shapes
from swap_hpc.data.encoded import Encoded
from swap_hpc.data.folders import folder_files
from swap_hpc.data.pack import pack
from swap_hpc.data.pieces import cut, pieces, pixels_within
from swap_hpc.data.sampling import Picks
from swap_hpc.data.splits import Files, Shards
from swap_hpc.errors import RunError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.augment import Augment
from swap_hpc.recipe.inputs import Data
from swap_hpc.recipe.values import DataName

SAMPLES = 7 * 5


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    """The same images, of 1 to 187,500 pixels, from a folder and from shards."""
    folder = imagenet_like.make(tmp_path_factory.mktemp("images"), classes=7, train=5, test=1)
    shards = tmp_path_factory.mktemp("shards")
    pack(folder, shards, 10, Team.alone(), lambda _: None)
    return [streamed("folder", folder, 24), streamed("webdataset", shards, 24)]


def streamed(name: DataName, path: Path, size: int) -> Dataset:
    data = Data(name=name, path=path, image_size=((0, size),), memory_gib=0)
    return load(data, Team.alone(), 1)


def train(data: Dataset) -> Encoded:
    """Return the training split anew, as before its first epoch: no size is known yet."""
    assert isinstance(data.train, Files | Shards)
    return data.train.take(np.arange(len(data.train)))


def paths(data: Dataset) -> tuple[str, ...]:
    assert isinstance(data.train, Files)
    return data.train.paths


def picks(batch: int, epochs: int = 2) -> Iterator[Picks]:
    generator = np.random.default_rng(3)
    for _ in range(epochs):
        order = generator.permutation(SAMPLES)
        for start in range(0, SAMPLES, batch):
            chosen = order[start : start + batch]
            yield Picks(chosen, generator.random((len(chosen), 5), dtype=np.float32))


def test_slices_are_as_long_as_fits() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        amounts = generator.integers(0, 50, generator.integers(1, 30))
        limit = int(generator.integers(1, 120))
        slices = [*cut(amounts, limit)]
        items = np.arange(len(amounts))
        joined = np.concatenate([items[each] for each in slices])
        assert joined.tolist() == items.tolist()
        assert all(amounts[each].sum() <= limit or each.stop - each.start == 1 for each in slices)
        one_more = [amounts[each.start : each.stop + 1].sum() for each in slices[:-1]]
        assert all(amount > limit for amount in one_more)


@pytest.mark.parametrize("pixels", [1, 200_000, 600_000, 2**40])
def test_a_piece_holds_at_most_the_given_pixels_or_one_image(
    pixels: int, sets: list[Dataset]
) -> None:
    """As Pillow counts them, in the first epoch as in the second, where sizes are known."""
    areas = np.array([np.prod(Image.open(path).size) for path in paths(sets[0])])
    for data in sets:
        found = [*pieces(train(data), picks(12), pixels, 1)]
        for piece in found:
            assert areas[piece.pick.indices].sum() <= pixels or len(piece.sources) == 1
        assert pixels < 2**40 or len(found) == 6
        joined: list[list[int]] = [[]]
        for piece in found:
            joined[-1] += piece.pick.indices.tolist()
            if piece.is_last:
                joined.append([])
        assert joined[-1] == []
        assert joined[:-1] == [pick.indices.tolist() for pick in picks(12)]


CROPS = Augment(flip=True, crop_area=(0.08, 1.0))
VIEWS = [
    loader.View(CROPS),
    loader.View(Augment(flip=True, pad=3, cutout=5)),
    loader.View(None),
    loader.View(None, (20, 20), 0.5),
]


@pytest.mark.parametrize("view", VIEWS, ids=["crops", "training", "evaluation", "small"])
def test_batches_do_not_depend_on_the_pieces(view: loader.View, sets: list[Dataset]) -> None:
    epochs = []
    for data in sets:
        for pixels in (2**40, 400_000, 1):
            data = replace(data, pixels_at_once=pixels, train=train(data))
            batches = list(loader.batches(data, data.train, picks(16), view, 16, tiny.CPU))
            assert [len(labels) for _, labels in batches] == [16, 16, 3] * 2
            for images, _ in batches:
                assert images.is_contiguous(memory_format=torch.channels_last)
            epochs.append([torch.cat(parts) for parts in zip(*batches, strict=True)])
    images, labels = epochs[0]
    for other_images, other_labels in epochs[1:]:
        assert torch.equal(other_images, images) and torch.equal(other_labels, labels)


def test_the_pixels_after_resizing_count(tmp_path: Path) -> None:
    """A strip of 4 x 2,000 pixels whose shorter side becomes 64 has 2 megapixels."""
    names = [str(tmp_path / f"{i}.png") for i in range(6)]
    for name in names:
        Image.new("L", (2000, 4)).save(name)
    strips = Files(tuple(names), np.zeros(6, np.int64))

    def sizes(resized: tuple[int, int] | None) -> list[int]:
        pick = Picks(np.arange(6), None)
        return [len(piece.sources) for piece in pieces(strips, iter([pick]), 2**22, 1, resized)]

    one_resized = 64 * 64 * 500
    assert 2 * one_resized <= 2**22 < 3 * one_resized
    assert sizes((64, 64)) == [2, 2, 2]
    assert sizes(None) == [6]


def test_a_folder_in_memory_does_not_depend_on_the_pieces(sets: list[Dataset]) -> None:
    for data in sets:
        whole = decode(train(data), (24, 24), 1, 2**40)
        in_pieces = decode(train(data), (24, 24), 1, 1)
        assert (in_pieces == whole).all() and whole.shape == (SAMPLES, 24, 24, 3)


def test_shapes_are_those_of_the_headers(sets: list[Dataset]) -> None:
    sizes = [list(Image.open(path).size[::-1]) for path in paths(sets[0])]
    for data in sets:
        assert image_shapes(train(data), range(SAMPLES), 1)[:, :2].tolist() == sizes


@pytest.mark.parametrize("harm", ["no image", "empty", "cut"])
def test_the_file_that_fails_is_named_whatever_the_piece(harm: str, tmp_path: Path) -> None:
    """Also where its header is sound, and it fails in the decoder."""
    folder = imagenet_like.make(tmp_path, classes=3, train=4, test=1)
    bad = Path(folder_files(folder)[0]["train"].paths[7])
    content = {"no image": b"\x89PNG not really", "empty": b"", "cut": bad.read_bytes()[:700]}
    bad.write_bytes(content[harm])
    data = streamed("folder", folder, 8)
    draws = np.full((4, 5), 0.5, np.float32)
    for pixels in (1, 2**40):
        data = replace(data, pixels_at_once=pixels, train=train(data))
        for view in (loader.View(CROPS), loader.View(Augment()), loader.View(None)):
            some = (Picks(np.arange(start, start + 4), draws) for start in range(0, 12, 4))
            with pytest.raises(RunError, match=rf"cannot decode the image {bad} \("):
                list(loader.batches(data, data.train, some, view, 4, tiny.CPU))


def test_memory_sets_how_many_pixels_are_decoded_at_once() -> None:
    assert pixels_within(0) == pixels_within(0.1) == 2**25
    assert 3 * pixels_within(64) == pytest.approx(8 * 2**30, rel=1e-6)
    for gib in (0.5, 1, 4, 40):
        assert 3 * pixels_within(gib) <= max(gib * 2**30 / 8, 3 * 2**25)


# Prints how many MiB the peak of memory grows by.
PEAK = """
import resource, sys
import numpy as np
from swap_hpc.data.decode import decode
from swap_hpc.data.splits import Files
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
files = Files((sys.argv[1],) * 32, np.zeros(32, np.int64))
decode(files.take(np.arange(1)), (8, 8), 1)
before = peak()
decode(files, (8, 8), 1, 2**22)
print(peak() - before)
"""


def test_photographs_do_not_take_memory_by_the_batch(tmp_path: Path) -> None:
    """32 photographs of 4 megapixels have 384 MB of pixels; decoding adds less than 100 MiB."""
    row = np.linspace(0, 255, 2000).astype(np.uint8)
    ramp = np.broadcast_to(row[None, :, None], (2000, 2000, 3))
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.ascontiguousarray(ramp)).save(photo)
    command = [sys.executable, "-c", PEAK, str(photo)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100
