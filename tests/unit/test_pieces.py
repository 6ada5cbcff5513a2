"""Decoding takes memory by the pixel, whatever the batch, and what comes out does not tell in how many pieces it was decoded."""

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
from swap_hpc.data.pack import pack
from swap_hpc.data.pieces import cut, pieces, pixels_within
from swap_hpc.data.sampling import Picks
from swap_hpc.data.sources import folder_files
from swap_hpc.data.splits import Files
from swap_hpc.errors import RunError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.schema import Augment, Data

SAMPLES = 7 * 5


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    """The same images, of 1 to 187,500 pixels, from a folder and from shards."""
    folder = imagenet_like.make(tmp_path_factory.mktemp("images"), classes=7, train=5, test=1)
    shards = tmp_path_factory.mktemp("shards")
    pack(folder, shards, 10, Team.alone(), lambda _: None)
    places = {"folder": folder, "webdataset": shards}
    return [
        load(Data(name=name, path=path, image_size=((0, 24),), memory_gib=0), Team.alone(), 1)
        for name, path in places.items()
    ]


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
        amounts, limit = (
            generator.integers(0, 50, generator.integers(1, 30)),
            int(generator.integers(1, 120)),
        )
        slices = [*cut(amounts, limit)]
        assert np.concatenate([np.arange(len(amounts))[each] for each in slices]).tolist() == [
            *range(len(amounts))
        ]
        assert all(amounts[each].sum() <= limit or each.stop - each.start == 1 for each in slices)
        assert all(amounts[a.start : a.stop + 1].sum() > limit for a in slices[:-1])


@pytest.mark.parametrize("pixels", [1, 200_000, 600_000, 2**40])
def test_a_piece_holds_so_many_pixels_at_most_or_one_image(
    pixels: int, sets: list[Dataset]
) -> None:
    """As Pillow counts them, in the first epoch as in the second, whose sizes are known."""
    areas = np.array([np.prod(Image.open(path).size) for path in sets[0].train.paths])  # type: ignore[union-attr]
    for data in sets:
        split = data.train.take(np.arange(SAMPLES))  # nothing known of it yet
        found = [*pieces(split, picks(12), pixels, 1)]  # type: ignore[arg-type]
        assert all(
            areas[piece.pick.indices].sum() <= pixels or len(piece.sources) == 1 for piece in found
        )
        joined: list[list[int]] = [[]]
        for piece in found:
            joined[-1] += piece.pick.indices.tolist()
            joined += [[]] if piece.is_last else []
        assert joined[:-1] == [pick.indices.tolist() for pick in picks(12)] and joined[-1] == []
        assert pixels < 2**40 or len(found) == 6


@pytest.mark.parametrize(
    "view",
    [loader.View(Augment(flip=True)), loader.View(None), loader.View(None, (20, 20), 0.5)],
    ids=repr,
)
def test_batches_do_not_tell_in_how_many_pieces_they_were_decoded(
    view: loader.View, sets: list[Dataset]
) -> None:
    seen = []
    for data in sets:
        for pixels in (2**40, 400_000, 1):
            data = replace(data, pixels_at_once=pixels, train=data.train.take(np.arange(SAMPLES)))
            batches = list(loader.batches(data, data.train, picks(16), view, 16, tiny.CPU))
            assert [len(labels) for _, labels in batches] == [16, 16, 3] * 2
            assert all(
                images.is_contiguous(memory_format=torch.channels_last) for images, _ in batches
            )
            seen.append([torch.cat(parts) for parts in zip(*batches, strict=True)])
    assert all(
        torch.equal(images, seen[0][0]) and torch.equal(labels, seen[0][1])
        for images, labels in seen[1:]
    )


def test_what_an_image_is_resized_to_counts(tmp_path: Path) -> None:
    """A strip of 4 x 2,000 pixels whose shorter side becomes 64 is 2 megapixels large."""
    paths = [str(tmp_path / f"{i}.png") for i in range(6)]
    for path in paths:
        Image.new("L", (2000, 4)).save(path)
    strips = Files(tuple(paths), np.zeros(6, np.int64))
    sizes = [
        len(piece.sources)
        for piece in pieces(strips, iter([Picks(np.arange(6), None)]), 2**22, 1, (64, 64))
    ]
    assert sizes == [2, 2, 2] and 2 * 64 * 64 * 500 <= 2**22 < 3 * 64 * 64 * 500
    assert [
        len(piece.sources) for piece in pieces(strips, iter([Picks(np.arange(6), None)]), 2**22, 1)
    ] == [6]


def test_a_folder_in_memory_does_not_tell_either(sets: list[Dataset]) -> None:
    for data in sets:
        whole = decode(data.train, (24, 24), 1, 2**40)  # type: ignore[arg-type]
        in_pieces = decode(data.train, (24, 24), 1, 1)  # type: ignore[arg-type]
        assert (in_pieces == whole).all() and whole.shape == (SAMPLES, 24, 24, 3)


def test_shapes_are_those_of_the_headers(sets: list[Dataset]) -> None:
    sizes = [Image.open(path).size[::-1] for path in sets[0].train.paths]  # type: ignore[union-attr]
    for data in sets:
        assert image_shapes(data.train, 1)[:, :2].tolist() == [list(size) for size in sizes]  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"\x89PNG not really", b"", "half"])
def test_the_file_that_fails_is_named_whatever_the_piece(
    content: bytes | str, tmp_path: Path
) -> None:
    """Also where its header is sound, and it fails in the decoder."""
    folder = imagenet_like.make(tmp_path, classes=3, train=4, test=1)
    bad = Path(folder_files(folder)[0].paths[7])
    bad.write_bytes(bad.read_bytes()[:700] if isinstance(content, str) else content)
    data = load(
        Data(name="folder", path=folder, image_size=((0, 8),), memory_gib=0), Team.alone(), 1
    )
    for pixels in (1, 2**40):
        data = replace(data, pixels_at_once=pixels, train=data.train.take(np.arange(12)))
        for view in (loader.View(Augment()), loader.View(None)):
            some = (
                Picks(np.arange(a, a + 4), np.full((4, 5), 0.5, np.float32))
                for a in range(0, 12, 4)
            )
            with pytest.raises(RunError, match=rf"cannot decode the image {bad} \("):
                list(loader.batches(data, data.train, some, view, 4, tiny.CPU))


def test_memory_sets_what_is_decoded_at_once() -> None:
    assert pixels_within(0) == pixels_within(0.1) == 2**25 and 3 * pixels_within(
        64
    ) == pytest.approx(8 * 2**30, rel=1e-6)
    assert all(3 * pixels_within(gib) <= max(gib * 2**30 / 8, 3 * 2**25) for gib in (0.5, 1, 4, 40))


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
    """32 of 4 megapixels are 384 MB of pixels, and were as much memory and more."""
    ramp = np.broadcast_to(
        np.linspace(0, 255, 2000).astype(np.uint8)[None, :, None], (2000, 2000, 3)
    )
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "photo.jpg")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "photo.jpg"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 100
