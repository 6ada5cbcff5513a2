"""DALI's pixels against numpy's and torchvision's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from swap_hpc.data import loader
from swap_hpc.data.dataset import Dataset
from swap_hpc.data.decode import decode
from swap_hpc.data.normalisation import normalisation_line, with_normalisation
from swap_hpc.data.places import streams_of
from swap_hpc.data.sampling import Key, Picks, epoch_picks, evaluation_picks, training_picks
from swap_hpc.data.splits import Arrays, Files
from swap_hpc.errors import RunError
from swap_hpc.recipe.augment import Augment
from swap_hpc.recipe.inputs import Data
from swap_hpc.recipe.phase import Phase


def normalised(dataset: Dataset, images: np.ndarray) -> np.ndarray:
    mean, std = np.array(dataset.mean, np.float32), np.array(dataset.std, np.float32)
    return (images.astype(np.float32) - mean) / std


CROPS = (0.08, 1.0)
AUGMENTS = [
    Augment(pad=2, flip=True, cutout=3),
    Augment(pad=1),
    Augment(cutout=4),
    Augment(flip=True),
    Augment(),
]


@pytest.mark.parametrize("augment", AUGMENTS)
def test_augmentation_equals_numpys(augment: Augment) -> None:
    data = tiny.dataset()
    assert isinstance(data.train, Arrays)
    pick = epoch_picks(Key(0, Phase.REFINE), 0, len(data.train))
    assert pick.draws is not None
    view, size = loader.View(augment), len(data.train)
    ((images, labels),) = loader.batches(data, data.train, iter([pick]), view, size, tiny.CPU)
    assert torch.equal(labels, torch.from_numpy(data.train.labels[pick.indices]))
    for image, index, u in zip(images.numpy(), pick.indices, pick.draws, strict=True):
        expected = augmented(data, data.train.images[index], u, augment)
        np.testing.assert_allclose(image.transpose(1, 2, 0), expected, rtol=1e-5, atol=1e-5)


def augmented(data: Dataset, image: np.ndarray, u: np.ndarray, augment: Augment) -> np.ndarray:
    """Augment and normalise an 8x8 image by its five random numbers `u`."""
    pad, cutout = augment.pad, augment.cutout
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    x, y = int(u[0] * (2 * pad + 1)), int(u[1] * (2 * pad + 1))
    result = normalised(data, padded[y : y + 8, x : x + 8])
    if augment.flip and u[2] >= 0.5:
        result = result[:, ::-1].copy()
    if cutout:
        left, top = int(u[3] * (8 - cutout + 1)), int(u[4] * (8 - cutout + 1))
        result[top : top + cutout, left : left + cutout] = 0
    return result


def test_images_are_channels_last_and_own_their_memory() -> None:
    data = tiny.dataset()
    picks = evaluation_picks(37, 5, 0, 1)
    batches = list(loader.batches(data, data.test, picks, loader.View(None), 5, tiny.CPU))
    first = batches[0][0].clone()
    for images, _ in batches:
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.dtype == torch.float32
    assert isinstance(data.test, Arrays)
    together = torch.cat([images for images, _ in batches]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(together, normalised(data, data.test.images), rtol=1e-5, atol=1e-5)
    assert torch.equal(first, batches[0][0])  # DALI has not used the memory again


@pytest.fixture
def files(tmp_path: Path) -> Dataset:
    """40 images of many sizes whose pixels show where they lie.

    Red grows from left to right, green grows downwards, and blue shows the class.
    """
    paths = []
    generator = np.random.default_rng(0)
    for i in range(40):
        height, width = generator.integers(60, 140, 2)
        red = np.broadcast_to(np.linspace(0, 255, width), (height, width))
        green = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
        blue = np.full((height, width), 80 * (i % 3))
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8)).save(paths[-1])
    split = Files(tuple(paths), np.arange(40) % 3)
    return Dataset(split, split, ("a", "b", "c"), (32, 32), 3, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("augment", [*AUGMENTS, Augment(crop_area=CROPS, flip=True, cutout=9)])
def test_images_in_memory_and_streamed_ones_are_augmented_alike(
    files: Dataset, augment: Augment
) -> None:
    """To the bit: `decode` makes what would be in memory; crops are of images of one size."""
    assert isinstance(files.train, Files)
    if augment.crop_area:
        size = (64, 64)
        for path in files.train.paths:
            Image.open(path).resize(size).save(path)
    decoded = decode(files.train, (32, 32) if augment.crop_area is None else (64, 64), 1)
    kept = replace(files, train=Arrays(decoded, files.train.labels))
    if augment.crop_area:
        files = replace(files, image_size=(64, 64))
        kept = replace(kept, image_size=(64, 64))
    pick = epoch_picks(Key(0, Phase.REFINE), 0, 40, streams_of(augment))
    view = loader.View(augment)
    ((found, labels),) = loader.batches(files, files.train, iter([pick]), view, 40, tiny.CPU)
    ((images, expected),) = loader.batches(kept, kept.train, iter([pick]), view, 40, tiny.CPU)
    assert torch.equal(found, images) and torch.equal(labels, expected)


def test_cutouts_of_random_crops_are_placed_by_draws_of_their_own(files: Dataset) -> None:
    """The other draws choose the crop's area and aspect ratio."""
    augment, plain = Augment(crop_area=CROPS, cutout=9), Augment(crop_area=CROPS)
    pick = epoch_picks(Key(0, Phase.REFINE), 0, 40, streams_of(augment))
    batches = [
        next(loader.batches(files, files.train, iter([pick]), loader.View(each), 40, tiny.CPU))[0]
        for each in (augment, plain)
    ]
    for image, whole, u in zip(*batches, pick.more["cutout"], strict=True):
        left, top = (int(each * (32 - 9 + 1)) for each in u)
        whole[:, top : top + 9, left : left + 9] = 0
        assert torch.equal(image, whole)


def test_images_are_normalised_by_the_stated_mean_and_deviation() -> None:
    kept = tiny.dataset()
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    assert isinstance(kept.test, Arrays)
    pixels = kept.test.images / 255
    imagenet = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for data, (m, s), owner in (
        (Data(name="synthetic", mean=mean, std=std), (mean, std), "the recipe's mean and standard"),
        (Data(name="synthetic", mean="imagenet", std="imagenet"), imagenet, "ImageNet's mean and"),
    ):
        found = with_normalisation(kept, data)
        picks = evaluation_picks(37, 37, 0, 1)
        view = loader.View(None)
        ((images, _),) = loader.batches(found, found.test, picks, view, 37, tiny.CPU)
        np.testing.assert_allclose(images.permute(0, 2, 3, 1), (pixels - m) / s, atol=1e-5)
        assert owner in normalisation_line(found, data)[0]
    data = Data(name="synthetic", std=std)
    assert normalisation_line(kept, data) == [
        "images are normalised by the training images' mean and the recipe's standard deviation"
    ]


@pytest.mark.parametrize("kind", ["memory", "streamed"])
def test_a_stream_that_begins_inside_an_epoch_is_the_rest_of_the_whole(
    files: Dataset, kind: str
) -> None:
    data = files if kind == "streamed" else tiny.dataset(40)
    view = loader.View(Augment(pad=1, flip=True))
    key = Key(0, Phase.REFINE, 1)

    def images(first_epoch: int, step: int) -> list[torch.Tensor]:
        picks = training_picks(key, 40, 12, 1, 2, range(first_epoch, 3), step)
        batches = loader.batches(data, data.train, picks, view, 6, tiny.CPU)
        return [images.clone() for images, _ in batches]

    whole, rest = images(0, 0), images(1, 2)
    assert len(whole) == 9 and len(rest) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], rest, strict=True))


def test_streamed_crops_have_the_stated_area_ratio_and_place(files: Dataset) -> None:
    """On a ramp the pixels of a crop show where its edges were."""
    assert isinstance(files.train, Files)
    augment = Augment(flip=True, crop_area=(0.2, 0.6), crop_ratio=(0.5, 2.0))
    pick = epoch_picks(Key(0, Phase.REFINE), 0, 40)
    assert pick.draws is not None
    view = loader.View(augment)
    ((images, labels),) = loader.batches(files, files.train, iter([pick]), view, 40, tiny.CPU)
    assert images.shape == (40, 3, 32, 32)
    assert torch.equal(labels, torch.from_numpy(files.train.labels[pick.indices]))
    for (red, green, blue), label, index, u in zip(
        images.numpy(), labels, pick.indices, pick.draws, strict=True
    ):
        assert np.allclose(blue, 80 * int(label), atol=2)
        width, height = Image.open(files.train.paths[index]).size
        area, ratio = 0.2 + u[3] * 0.4, 0.5 * 4 ** u[4]
        # sides of the crop as shares of the image's
        w = min(1, np.sqrt(area * ratio * height / width))
        h = min(1, np.sqrt(area / ratio * width / height))
        unmirrored = red[:, ::-1] if u[2] >= 0.5 else red
        centre, middle = u[0] * (1 - w) + w / 2, u[1] * (1 - h) + h / 2
        assert unmirrored.mean() / 255 == pytest.approx(centre, abs=0.03)
        assert green.mean() / 255 == pytest.approx(middle, abs=0.03)
        across = unmirrored[:, -1] - unmirrored[:, 0]
        assert across.mean() / 255 == pytest.approx(w, abs=0.06)


def test_streamed_crops_are_torchvisions(tmp_path: Path) -> None:
    """On noise: cropped, resized with antialiasing, mirrored and normalised.

    Up to one level and a half of 255, which rounding explains.
    """
    generator = np.random.default_rng(1)
    images = []
    for _ in range(24):
        height, width = generator.integers(20, 90, 2)
        images.append(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    paths = [str(tmp_path / f"{i}.png") for i in range(24)]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path)
    split = Files(tuple(paths), np.zeros(24, np.int64))
    data = Dataset(split, split, ("a",), (24, 40), 3, (100.0, 110.0, 120.0), (50.0, 60.0, 70.0))
    pick = epoch_picks(Key(0, Phase.REFINE), 0, 24)
    assert pick.draws is not None and 0 < (pick.draws[:, 2] >= 0.5).sum() < 24
    view = loader.View(Augment(flip=True, crop_area=CROPS))
    ((found, _),) = loader.batches(data, split, iter([pick]), view, 24, tiny.CPU)
    assert found.is_contiguous(memory_format=torch.channels_last)
    pixels = found.permute(0, 2, 3, 1).numpy() * data.std + data.mean
    for image, index, u in zip(pixels, pick.indices, pick.draws, strict=True):
        expected = cropped_by_torchvision(images[index], u, [24, 40])
        np.testing.assert_allclose(image, expected, atol=1.5)


def cropped_by_torchvision(image: np.ndarray, u: np.ndarray, size: list[int]) -> np.ndarray:
    """Crop, resize and mirror an image by its five random numbers `u`."""
    shape = np.array(image.shape[:2])
    area = (0.08 + u[3] * 0.92) * shape.prod()
    aspect = np.exp(np.log(3 / 4) + u[4] * np.log(16 / 9))
    wanted = np.floor(np.sqrt([area / aspect, area * aspect]) + 0.5)
    height, width = np.minimum(shape, wanted).astype(int)
    top, left = np.floor(u[1::-1] * (shape - [height, width] + 1)).astype(int)
    crop = functional.to_pil_image(image[top : top + height, left : left + width])
    resized = np.asarray(functional.resize(crop, size, antialias=True))
    return resized[:, ::-1] if u[2] >= 0.5 else resized


def test_streamed_evaluation_takes_the_centre(files: Dataset) -> None:
    picks = evaluation_picks(40, 16, 0, 1)
    batches = list(loader.batches(files, files.test, picks, loader.View(None), 16, tiny.CPU))
    assert [len(images) for images, _ in batches] == [16, 16, 8]
    for images, _ in batches:
        np.testing.assert_allclose(images[:, :2].mean((2, 3)) / 255, 0.5, atol=0.03)


def test_an_image_that_cannot_be_decoded_is_named(files: Dataset) -> None:
    assert isinstance(files.train, Files)
    Path(files.train.paths[23]).write_bytes(b"\x89PNG not really")
    draws = np.full((8, 5), 0.5, np.float32)
    picks = (Picks(np.arange(start, start + 8), draws) for start in range(0, 40, 8))
    batches = loader.batches(files, files.train, picks, loader.View(Augment()), 8, tiny.CPU)
    message = r"cannot decode the image .*/23.png \(not an image that DALI decodes, or damaged\)"
    seen = 0
    with pytest.raises(RunError, match=message):
        for images, _ in batches:
            seen += len(images)
    assert seen <= 16  # the batch of image 23 has not come


def test_an_image_that_is_gone_is_named(files: Dataset) -> None:
    assert isinstance(files.test, Files)
    Path(files.test.paths[3]).unlink()
    picks = evaluation_picks(40, 16, 0, 1)
    batches = loader.batches(files, files.test, picks, loader.View(None), 16, tiny.CPU)
    message = r"cannot decode the image .*/3.png \(No such file or directory\)"
    with pytest.raises(RunError, match=message):
        list(batches)
