"""RandAugment, TrivialAugment, colour jitter and random erasing against other computations.

On fixed draws, and on noise, where every pixel counts. Operations that only move or select pixels
are exact; the others may differ by the stated levels of 255, which rounding explains.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from scipy.ndimage import convolve, map_coordinates  # type: ignore[import-untyped]
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from swap_hpc.data import loader
from swap_hpc.data.choices import POLICY, choices
from swap_hpc.data.dataset import Dataset
from swap_hpc.data.places import streams_of
from swap_hpc.data.sampling import Key, Picks, epoch_picks
from swap_hpc.data.splits import Arrays
from swap_hpc.recipe.augment import Augment
from swap_hpc.recipe.phase import Phase

HEIGHT, WIDTH, NUMBER = 20, 26, 200


def noise() -> Dataset:
    """Return images whose pixels come out of the loader as they are."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (NUMBER, HEIGHT, WIDTH, 3), dtype=np.uint8)
    images[::3] = 60 + images[::3] // 4  # some have little contrast
    split = Arrays(images, np.arange(NUMBER) % 5)
    return Dataset(split, split, tuple("abcde"), (HEIGHT, WIDTH), 3, (0.0,) * 3, (1.0,) * 3)


DATA = noise()


def pick(augment: Augment) -> Picks:
    return epoch_picks(Key(0, Phase.REFINE), 0, NUMBER, streams_of(augment))


def augmented(augment: Augment, data: Dataset = DATA) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (n, H, W, C) before and after an augmentation."""
    ours = pick(augment)
    view = loader.View(augment)
    ((images, _),) = loader.batches(data, data.train, iter([ours]), view, NUMBER, tiny.CPU)
    assert isinstance(data.train, Arrays)
    return data.train.images[ours.indices], images.permute(0, 2, 3, 1).numpy()


def moved(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return an image whose pixels come from other places, bilinearly, grey outside."""
    channels = [
        map_coordinates(image[..., c].astype(float), [rows, columns], order=1, **GREY)
        for c in range(3)
    ]
    return np.round(np.stack(channels, -1))


GREY: dict[str, Any] = {"mode": "grid-constant", "cval": 128.0}
ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH].astype(float)


def rotated(image: np.ndarray, degrees: float) -> np.ndarray:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    y, x = ROWS - (HEIGHT - 1) / 2, COLUMNS - (WIDTH - 1) / 2
    rows = cos * y + sin * x + (HEIGHT - 1) / 2
    return moved(image, rows, cos * x - sin * y + (WIDTH - 1) / 2)


def sharpened(image: np.ndarray, factor: float) -> np.ndarray:
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    blurred = convolve(image.astype(float), kernel[..., None], mode="mirror")
    return np.round(np.clip(factor * image + (1 - factor) * blurred, 0, 255))


def equalized(image: np.ndarray) -> np.ndarray:
    result = np.empty_like(image)
    for c in range(3):
        counts = np.bincount(image[..., c].ravel(), minlength=256)
        first = np.flatnonzero(counts)[0]
        summed = np.cumsum(counts) - counts[first]
        table = np.round(255 * summed / (counts.sum() - counts[first]))
        result[..., c] = table.clip(0, 255)[image[..., c]]
    return result


def by_torchvision(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    def call(image: np.ndarray, *parameter: float) -> np.ndarray:
        tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)
        return np.asarray(function(tensor, *parameter).permute(1, 2, 0))

    return call


Reference = Callable[[np.ndarray, float], np.ndarray]

# What each operation does, and by how many levels of 255 it may differ.
REFERENCES: dict[str, tuple[Reference, float]] = {
    "identity": (lambda image, _: image, 0),
    "shear_x": (lambda image, m: moved(image, ROWS, COLUMNS - m * (ROWS + 0.5)), 1),
    "shear_y": (lambda image, m: moved(image, ROWS - m * (COLUMNS + 0.5), COLUMNS), 1),
    "translate_x": (lambda image, m: moved(image, ROWS, COLUMNS - m), 0),
    "translate_y": (lambda image, m: moved(image, ROWS - m, COLUMNS), 0),
    "rotate": (rotated, 1),
    "brightness": (by_torchvision(functional.adjust_brightness), 1),
    "saturation": (by_torchvision(functional.adjust_saturation), 2),
    "contrast": (by_torchvision(functional.adjust_contrast), 1),
    "sharpness": (sharpened, 1),
    "posterize": (lambda image, mask: image & np.uint8(mask), 0),
    "solarize": (by_torchvision(functional.solarize), 0),
    "auto_contrast": (lambda image, _: by_torchvision(functional.autocontrast)(image), 1),
    "equalize": (lambda image, _: equalized(image), 1),
    "hue": (by_torchvision(functional.adjust_hue), 1),
}

# torchvision's names of the same operations.
NAMES = {
    "Identity": "identity",
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateX": "translate_x",
    "TranslateY": "translate_y",
    "Rotate": "rotate",
    "Brightness": "brightness",
    "Color": "saturation",
    "Contrast": "contrast",
    "Sharpness": "sharpness",
    "Posterize": "posterize",
    "Solarize": "solarize",
    "AutoContrast": "auto_contrast",
    "Equalize": "equalize",
}


def wanted(space: dict[str, Any], u: np.ndarray, magnitude: int) -> tuple[str, float]:
    """Return the operation and the parameter by torchvision's tables, for a round's three draws."""
    name = NAMES[list(space)[int(u[0] * 14)]]
    values, is_signed = list(space.values())[int(u[0] * 14)]
    table = values(31, HEIGHT, WIDTH)
    if table is None:
        return name, 0
    value = float(table[magnitude]) * (-1 if is_signed and u[1] < 0.5 else 1)
    if name.startswith("translate"):
        return name, int(round(value, 3))  # the table is float32: 15.9999 are 16 pixels
    if name == "posterize":
        return name, 256 - 2 ** (8 - int(value))
    if name == "solarize":
        return name, value * 255 if value <= 1 else value
    is_factor = name in ("brightness", "saturation", "contrast", "sharpness")
    return name, 1 + value if is_factor else value


@pytest.mark.parametrize("kind", ["randaugment", "trivial_augment"])
def test_a_policys_operations_are_torchvisions(kind: str) -> None:
    trivial = kind == "trivial_augment"
    transform = v2.TrivialAugmentWide if trivial else v2.RandAugment
    space = transform._AUGMENTATION_SPACE
    assert tuple(NAMES[name] for name in space) == POLICY
    augment = Augment(trivial_augment=True) if trivial else Augment(randaugment=1)
    before, after = augmented(augment)
    draws = pick(augment).more["policy"]
    (found,) = choices(pick(augment), augment, (HEIGHT, WIDTH))
    seen = set()
    for image, result, u, number, parameter in zip(
        before, after, draws, found.chosen, found.parameters, strict=True
    ):
        name, value = wanted(space, u, int(u[2] * 31) if trivial else 9)
        assert name == POLICY[number] and parameter == pytest.approx(value, rel=1e-5, abs=1e-5)
        reference, levels = REFERENCES[name]
        expected = reference(image, float(parameter)).astype(float)
        np.testing.assert_allclose(result, expected, atol=levels, err_msg=f"{name} {parameter}")
        seen.add(name)
    assert seen == set(POLICY)


def test_randaugment_applies_its_rounds_in_turn() -> None:
    augment = Augment(randaugment=2, randaugment_magnitude=20)
    before, after = augmented(augment)
    rounds = choices(pick(augment), augment, (HEIGHT, WIDTH))
    exact = {name for name, (_, levels) in REFERENCES.items() if levels == 0}
    compared = 0
    for i, (image, result) in enumerate(zip(before, after, strict=True)):
        names = [POLICY[each.chosen[i]] for each in rounds]
        if names[0] not in exact:
            continue  # equalize or solarize would make much of one level
        for name, each in zip(names, rounds, strict=True):
            image = REFERENCES[name][0](image, float(each.parameters[i])).astype(np.uint8)
        np.testing.assert_allclose(result, image, atol=REFERENCES[names[1]][1] + 1)
        compared += 1
    assert compared > 30


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_jitter_is_torchvisions(name: str) -> None:
    augment = Augment.model_validate({name: 0.4})
    before, after = augmented(augment)
    u = pick(augment).more["jitter"][:, 1]
    factors = (2 * u - 1) * 0.4 if name == "hue" else 0.6 + u * 0.8
    reference, levels = REFERENCES[name]
    for image, result, factor in zip(before, after, factors, strict=True):
        np.testing.assert_allclose(result, reference(image, float(factor)), atol=levels)


def test_jitters_are_applied_in_a_random_order() -> None:
    augment = Augment(brightness=0.3, contrast=0.3, saturation=0.3)
    before, after = augmented(augment)
    draws = pick(augment).more["jitter"]
    names = ("brightness", "contrast", "saturation")
    orders = set()
    for image, result, u in zip(before, after, draws, strict=True):
        order = np.argsort(u[:3])
        for number in order:
            image = REFERENCES[names[number]][0](image, float(0.7 + u[3 + number] * 0.6))
        np.testing.assert_allclose(result, image, atol=5)  # the levels of all three add up
        orders.add(tuple(order))
    assert len(orders) == 6


def test_erased_boxes_have_the_stated_probability_area_ratio_and_place() -> None:
    augment = Augment(erasing=0.5, erasing_area=(0.1, 0.3), erasing_ratio=(0.5, 2.0))
    before, after = augmented(augment)
    erased = 0
    for image, result, u in zip(before, after, pick(augment).more["erasing"], strict=True):
        expected = image.astype(np.float32)
        if u[0] < 0.5:
            area = (0.1 + 0.2 * float(u[1])) * HEIGHT * WIDTH
            ratio = 0.5 * 4 ** float(u[2])
            width = min(WIDTH, int(np.sqrt(area * ratio) + 0.5))
            height = min(HEIGHT, int(np.sqrt(area / ratio) + 0.5))
            left, top = int(u[3] * (WIDTH - width + 1)), int(u[4] * (HEIGHT - height + 1))
            expected[top : top + height, left : left + width] = 0
            erased += 1
        np.testing.assert_array_equal(result, expected)
    assert 70 < erased < 130


def test_operations_come_between_mirroring_and_normalising_and_boxes_last() -> None:
    """With all at once; the order of what is done to an image."""
    settings: dict[str, Any] = {"pad": 2, "flip": True, "cutout": 5, "erasing": 0.5}
    augment = Augment(**settings, contrast=0.4)
    moved_only, both = augmented(Augment(pad=2, flip=True))[1], augmented(augment)[1]
    boxes_only = augmented(Augment(**settings))[1]
    u = pick(augment).more["jitter"][:, 1]
    for image, result, boxed, factor in zip(moved_only, both, boxes_only, u, strict=True):
        expected = REFERENCES["contrast"][0](image.astype(np.uint8), float(0.6 + factor * 0.8))
        covered = (boxed == 0).all(-1, keepdims=True) & (image != 0).any(-1, keepdims=True)
        np.testing.assert_allclose(result, np.where(covered, 0, expected), atol=1)
