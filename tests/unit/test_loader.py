"""What DALI makes of images, against numpy and torchvision."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from swap_hpc.data import loader
from swap_hpc.data.dataset import Dataset
from swap_hpc.data.sampling import Key, Picks, epoch_picks, evaluation_picks, training_picks
from swap_hpc.data.splits import Arrays, Files
from swap_hpc.errors import RunError
from swap_hpc.recipe.phase import Phase
from swap_hpc.recipe.schema import Augment


def normalised(dataset: Dataset, images: np.ndarray) -> np.ndarray:
    return (images.astype(np.float32) - np.array(dataset.mean, np.float32)) / np.array(
        dataset.std, np.float32
    )


@pytest.mark.parametrize(
    "augment",
    [
        Augment(pad=2, flip=True, cutout=3),
        Augment(pad=1),
        Augment(cutout=4),
        Augment(flip=True),
        Augment(),
    ],
)
def test_augmentation_equals_numpys(augment: Augment) -> None:
    data = tiny.dataset()
    assert isinstance(data.train, Arrays)
    pick = epoch_picks(Key(0, Phase.REFINE), 0, len(data.train))
    assert pick.draws is not None
    ((images, labels),) = loader.batches(
        data, data.train, iter([pick]), loader.View(augment), len(data.train), tiny.CPU
    )
    assert torch.equal(labels, torch.from_numpy(data.train.labels[pick.indices]))
    p, c = augment.pad, augment.cutout
    for image, index, u in zip(images.numpy(), pick.indices, pick.draws, strict=True):
        padded = np.pad(data.train.images[index], ((p, p), (p, p), (0, 0)), mode="reflect")
        x, y = int(u[0] * (2 * p + 1)), int(u[1] * (2 * p + 1))
        expected = normalised(data, padded[y : y + 8, x : x + 8])
        if augment.flip and u[2] >= 0.5:
            expected = expected[:, ::-1].copy()
        if c:
            left, top = int(u[3] * (8 - c + 1)), int(u[4] * (8 - c + 1))
            expected[top : top + c, left : left + c] = 0
        np.testing.assert_allclose(image.transpose(1, 2, 0), expected, rtol=1e-5, atol=1e-5)


def test_images_are_channels_last_and_own_their_memory() -> None:
    data = tiny.dataset()
    batches = list(
        loader.batches(
            data, data.test, evaluation_picks(37, 5, 0, 1), loader.View(None), 5, tiny.CPU
        )
    )
    first = batches[0][0].clone()
    assert all(
        images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32
        for images, _ in batches
    )
    assert isinstance(data.test, Arrays)
    together = torch.cat([images for images, _ in batches]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(together, normalised(data, data.test.images), rtol=1e-5, atol=1e-5)
    assert torch.equal(first, batches[0][0])  # DALI has not used the memory again


@pytest.fixture
def files(tmp_path: Path) -> Dataset:
    """40 images of many sizes whose red grows from left to right and whose green grows downwards; blue tells the class."""
    paths = []
    generator = np.random.default_rng(0)
    for i in range(40):
        h, w = generator.integers(60, 140, 2)
        ramp = np.stack(
            [
                np.broadcast_to(np.linspace(0, 255, w), (h, w)),
                np.broadcast_to(np.linspace(0, 255, h)[:, None], (h, w)),
                np.full((h, w), 80 * (i % 3)),
            ],
            -1,
        )
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(ramp.astype(np.uint8)).save(paths[-1])
    split = Files(tuple(paths), np.arange(40) % 3)
    return Dataset(split, split, ("a", "b", "c"), (32, 32), 3, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("kind", ["memory", "streamed"])
def test_a_stream_that_begins_inside_an_epoch_is_the_rest_of_the_whole(
    files: Dataset, kind: str
) -> None:
    data = files if kind == "streamed" else tiny.dataset(40)
    augment, key = Augment(pad=0 if kind == "streamed" else 1, flip=True), Key(0, Phase.REFINE, 1)

    def images(first_epoch: int, step: int) -> list[torch.Tensor]:
        picks = training_picks(key, 40, 12, 1, 2, range(first_epoch, 3), step)
        return [
            batch.clone()
            for batch, _ in loader.batches(
                data, data.train, picks, loader.View(augment), 6, tiny.CPU
            )
        ]

    whole, rest = images(0, 0), images(1, 2)
    assert len(whole) == 9 and len(rest) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], rest, strict=True))


def test_streamed_crops_have_the_stated_area_ratio_and_place(files: Dataset) -> None:
    """On a ramp the crop's edges can be read off its pixels."""
    assert isinstance(files.train, Files)
    augment = Augment(flip=True, crop_area=(0.2, 0.6), crop_ratio=(0.5, 2.0))
    pick = epoch_picks(Key(0, Phase.REFINE), 0, 40)
    assert pick.draws is not None
    ((images, labels),) = loader.batches(
        files, files.train, iter([pick]), loader.View(augment), 40, tiny.CPU
    )
    assert images.shape == (40, 3, 32, 32) and torch.equal(
        labels, torch.from_numpy(files.train.labels[pick.indices])
    )
    for image, label, index, u in zip(
        images.numpy(), labels, pick.indices, pick.draws, strict=True
    ):
        assert np.allclose(image[2], 80 * int(label), atol=2)
        width, height = Image.open(files.train.paths[index]).size
        area, ratio = 0.2 + u[3] * 0.4, 0.5 * 4 ** u[4]
        w, h = (
            min(1, np.sqrt(area * ratio * height / width)),
            min(1, np.sqrt(area / ratio * width / height)),
        )
        red = image[0][:, ::-1] if u[2] >= 0.5 else image[0]
        assert red.mean() / 255 == pytest.approx(u[0] * (1 - w) + w / 2, abs=0.03)
        assert image[1].mean() / 255 == pytest.approx(u[1] * (1 - h) + h / 2, abs=0.03)
        assert (red[:, -1] - red[:, 0]).mean() / 255 == pytest.approx(w, abs=0.06)


def test_streamed_crops_are_torchvisions(tmp_path: Path) -> None:
    """On noise, to a level of 255 and a half, which is what rounding leaves: cropped, resized with antialiasing, mirrored, normalised."""
    generator = np.random.default_rng(1)
    images = [
        generator.integers(0, 256, (*generator.integers(20, 90, 2), 3), dtype=np.uint8)
        for _ in range(24)
    ]
    paths = [str(tmp_path / f"{i}.png") for i in range(24)]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path)
    split = Files(tuple(paths), np.zeros(24, np.int64))
    data = Dataset(split, split, ("a",), (24, 40), 3, (100.0, 110.0, 120.0), (50.0, 60.0, 70.0))
    pick = epoch_picks(Key(0, Phase.REFINE), 0, 24)
    assert pick.draws is not None and 0 < (pick.draws[:, 2] >= 0.5).sum() < 24
    ((found, _),) = loader.batches(
        data, split, iter([pick]), loader.View(Augment(flip=True)), 24, tiny.CPU
    )
    assert found.is_contiguous(memory_format=torch.channels_last)
    for image, index, u in zip(
        found.permute(0, 2, 3, 1).numpy(), pick.indices, pick.draws, strict=True
    ):
        whole = images[index]
        area, aspect = (
            (0.08 + u[3] * 0.92) * whole.shape[0] * whole.shape[1],
            np.exp(np.log(3 / 4) + u[4] * np.log(16 / 9)),
        )
        size = np.minimum(
            whole.shape[:2], np.floor(np.sqrt([area / aspect, area * aspect]) + 0.5)
        ).astype(int)
        top, left = np.floor(u[1::-1] * (np.array(whole.shape[:2]) - size + 1)).astype(int)
        crop = functional.to_pil_image(whole[top : top + size[0], left : left + size[1]])
        expected = np.asarray(functional.resize(crop, [24, 40], antialias=True))
        expected = expected[:, ::-1] if u[2] >= 0.5 else expected
        np.testing.assert_allclose(image * data.std + data.mean, expected, atol=1.5)


def test_streamed_evaluation_takes_the_centre(files: Dataset) -> None:
    batches = list(
        loader.batches(
            files, files.test, evaluation_picks(40, 16, 0, 1), loader.View(None), 16, tiny.CPU
        )
    )
    assert [len(images) for images, _ in batches] == [16, 16, 8]
    for images, _ in batches:
        np.testing.assert_allclose(images[:, :2].mean((2, 3)) / 255, 0.5, atol=0.03)


def test_an_image_that_cannot_be_decoded_is_named(files: Dataset) -> None:
    assert isinstance(files.train, Files)
    Path(files.train.paths[23]).write_bytes(b"\x89PNG not really")
    picks = iter(
        [Picks(np.arange(a, a + 8), np.full((8, 5), 0.5, np.float32)) for a in range(0, 40, 8)]
    )
    seen = 0
    with pytest.raises(
        RunError,
        match=r"cannot decode the image .*/23.png \(not an image that DALI decodes, or damaged\)",
    ):
        for images, _ in loader.batches(
            files, files.train, picks, loader.View(Augment()), 8, tiny.CPU
        ):
            seen += len(images)
    assert seen <= 16


def test_an_image_that_is_gone_is_named(files: Dataset) -> None:
    assert isinstance(files.test, Files)
    Path(files.test.paths[3]).unlink()
    with pytest.raises(
        RunError, match=r"cannot decode the image .*/3.png \(No such file or directory\)"
    ):
        list(
            loader.batches(
                files, files.test, evaluation_picks(40, 16, 0, 1), loader.View(None), 16, tiny.CPU
            )
        )
