"""A set of images that is shaped like ImageNet: 1,000 classes, JPEG files of 500x375 and of odd sizes, grey and CMYK ones among them."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZES = (
    (500, 375),
    (375, 500),
    (333, 500),
    (500, 334),
    (61, 47),
    (1, 1),
    (640, 9),
    (257, 255),
)  # width, height


def make(root: Path, classes: int = 1000, train: int = 2, test: int = 1, seed: int = 0) -> Path:
    """`train` and `test` images per class, of real textures' kind (smooth, with edges), whose colour tells their class.

    Every tenth is grey, every 13th CMYK as Adobe writes it; one in eight is of each of `SIZES`.
    """
    generator = np.random.default_rng(seed)
    number = 0
    for split, images in (("train", train), ("test", test)):
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for i in range(images):
                _image(generator, label, SIZES[number % len(SIZES)], number).save(
                    folder / f"n{label:08d}_{i}.JPEG", quality=85
                )
                number += 1
    return root


def _image(
    generator: np.random.Generator, label: int, size: tuple[int, int], number: int
) -> Image.Image:
    colour = np.array([label % 10, label // 10 % 10, label // 100]) * 22 + 20
    coarse = np.clip(colour + generator.normal(0, 30, (12, 16, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    return (
        image.convert("L")
        if number % 10 == 3
        else image.convert("CMYK")
        if number % 13 == 5
        else image
    )
