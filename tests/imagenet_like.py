"""A generated set of images that is shaped like ImageNet.

It has 1,000 classes and JPEG files of 500x375 pixels and of odd sizes, some of them grey or CMYK.
"""

from pathlib import Path

import numpy as np
from PIL import Image

# (width, height)
LARGE = ((500, 375), (375, 500), (333, 500), (500, 334))
ODD = ((61, 47), (1, 1), (640, 9), (257, 255))
SIZES = LARGE + ODD


def make(root: Path, classes: int = 1000, train: int = 2, test: int = 1, seed: int = 0) -> Path:
    """Write `train` and `test` images per class: smooth textures in a colour for each class.

    Sizes take turns. One in ten images is grey; one in thirteen is CMYK, as Adobe writes it.
    """
    generator = np.random.default_rng(seed)
    number = 0
    for split, images in (("train", train), ("test", test)):
        for label in range(classes):
            name = f"n{label:08d}"
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(images):
                image = _image(generator, label, number)
                image.save(folder / f"{name}_{i}.JPEG", quality=85)
                number += 1
    return root


def _image(generator: np.random.Generator, label: int, number: int) -> Image.Image:
    digits = np.array([label % 10, label // 10 % 10, label // 100])
    colour = digits * 22 + 20
    coarse = np.clip(colour + generator.normal(0, 30, (12, 16, 3)), 0, 255).astype(np.uint8)
    size = SIZES[number % len(SIZES)]
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    if number % 10 == 3:
        return image.convert("L")
    if number % 13 == 5:
        return image.convert("CMYK")
    return image
