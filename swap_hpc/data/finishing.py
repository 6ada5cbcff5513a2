"""From cropped pixels to what a model takes in: mirrored, normalised, partly covered."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import do_not_convert
from torch import Tensor
from torch.nn import functional as F

from swap_hpc.data.choices import choices
from swap_hpc.data.dataset import Dataset
from swap_hpc.data.operations import operated
from swap_hpc.data.places import (
    crop_corners,
    cutout_corners,
    draws,
    erased,
    float32,
    mirrored,
    random_crops,
)
from swap_hpc.data.sampling import Picks
from swap_hpc.recipe.augment import Augment

# Name -> what a graph takes in for one batch, with an entry for each sample.
Numbers = dict[str, np.ndarray]
Nodes = dict[str, Any]

# The numbers of the boxes that are set to 0, each (n, 2) float32: corners, and sides.
BOXES = ("cutout", "erased", "erased sides")

NOBODY = Picks(np.zeros(0, np.int64), None)


def numbers(pick: Picks, augment: Augment, size: tuple[int, int]) -> Numbers:
    """Return what a graph takes in beside the images: always the same names in the same order.

    Args:
        pick: n samples.
        augment: what is done to them.
        size: (height, width) of the finished images in pixels.
    """
    found: Numbers = {"mirror": mirrored(draws(pick), augment)}
    if augment.crop_area:
        found |= random_crops(pick, augment)
    if augment.pad:
        # DALI wants the crop's place as a share of the room that it has
        room = np.float32(2 * augment.pad)
        x, y = crop_corners(draws(pick), augment).T / room
        found |= {"x": float32(x), "y": float32(y)}
    for number, each in enumerate(choices(pick, augment, size)):
        found |= {f"operation {number}": each.chosen, f"parameter {number}": each.parameters}
        if len(each.operations) == 1:
            del found[f"operation {number}"]
    if augment.cutout:
        found["cutout"] = float32(cutout_corners(pick, augment, size))
    if augment.erasing:
        found["erased"], found["erased sides"] = erased(pick, augment, size)
    return found


# DALI rewrites a branching graph, and knows only a part of Python: not in these functions.
@do_not_convert
def taken_in(
    feed: Iterator[tuple[Any, ...]], layout: str, augment: Augment, size: tuple[int, int]
) -> tuple[Any, Nodes]:
    """In a DALI graph, take in images and their numbers.

    Args:
        feed: for each batch, the images (or where they are) and then the values of `numbers`.
        layout: DALI's layout of the images; empty where they are something else.
        augment: as in `numbers`.
        size: as in `numbers`.
    """
    names = list(numbers(NOBODY, augment, size))
    layouts = [layout, *[""] * len(names)]
    image, *nodes = fn.external_source(feed, num_outputs=len(layouts), batch=True, layout=layouts)
    return image, dict(zip(names, nodes, strict=True))


def finished(
    image: Any, nodes: Nodes, dataset: Dataset, augment: Augment, size: tuple[int, int]
) -> Any:
    """In a DALI graph, crop padded images, mirror, normalise and cover them.

    Args:
        image: uint8, padded already.
        nodes: the numbers, as `taken_in` returns them.
        dataset: whose mean and deviation normalise the images.
        augment: what is done to them.
        size: (height, width) in pixels.
    """
    place: Nodes = {}
    if augment.pad:
        place = {"crop": size, "crop_pos_x": nodes["x"], "crop_pos_y": nodes["y"]}
    if augment.operates:
        image = fn.crop(image, **place) if augment.pad else image
        image = operated(fn.flip(image, horizontal=nodes["mirror"]), rounds_of(nodes, augment))
        image = normalised(image, dataset)
    else:
        image = normalised(image, dataset, mirror=nodes["mirror"], **place)
    if augment.cutout:
        image = _covered(image, nodes["cutout"], (augment.cutout, augment.cutout))
    if augment.erasing:
        image = _covered(image, nodes["erased"], nodes["erased sides"])
    return image


@do_not_convert
def rounds_of(nodes: Nodes, augment: Augment) -> list[tuple[tuple[str, ...], Any, Any]]:
    """Return what `operated` takes in."""
    return [
        (each.operations, nodes.get(f"operation {number}"), nodes[f"parameter {number}"])
        for number, each in enumerate(choices(NOBODY, augment, (1, 1)))
    ]


def _covered(image: Any, corner: Any, sides: Any) -> Any:
    return fn.erase(image, anchor=corner, shape=sides, axis_names="WH", fill_value=0.0)


def normalised(image: Any, dataset: Dataset, **arguments: Any) -> Any:
    """In a DALI graph, normalise images, (H, W, C) float32.

    Seen as (C, H, W) that is the layout channels_last, without a copy.
    """
    return fn.crop_mirror_normalize(
        image,
        mean=dataset.mean,
        std=dataset.std,
        dtype=types.FLOAT,
        output_layout="HWC",
        **arguments,
    )


def reflected(image: Any, pad: int, size: tuple[int, int]) -> Any:
    """In a DALI graph, pad images (H, W, C) of one size by reflection.

    DALI has no such operator: each edge is a mirrored strip of the image.
    """
    height, width = size
    left = fn.flip(image[:, 1 : pad + 1], horizontal=1, vertical=0)
    right = fn.flip(image[:, width - pad - 1 : width - 1], horizontal=1, vertical=0)
    wide = fn.cat(left, image, right, axis_name="W")
    top = fn.flip(wide[1 : pad + 1], horizontal=0, vertical=1)
    bottom = fn.flip(wide[height - pad - 1 : height - 1], horizontal=0, vertical=1)
    return fn.cat(top, wide, bottom, axis_name="H")


def resize_crops(
    size: tuple[int, int],
    dataset: Dataset,
    augment: Augment,
    crops: Any,
    mirror: Any,
    *boxes: Any,
) -> Tensor:
    """Resize, mirror, normalise and cover crops on the CPU.

    torch's kernel for antialiased uint8 takes a fifth of the time of DALI's.

    Args:
        size: (height, width) in pixels to resize to.
        dataset: whose mean and deviation normalise the images.
        augment: what covers the images: its cutout and erasing.
        crops: a batch of DALI's, each (h, w, C) uint8 of any size.
        mirror: a batch of DALI's, (n,) int32, 1 for each crop to mirror.
        boxes: the batches of `BOXES` that the augmentation has.

    Returns:
        (n, H, W, C) float32.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # an image is too small to share, and DALI's threads have the cores
    height, width = size
    images = torch.empty(len(crops), height, width, dataset.channels)
    # A row of pixels at a time: channels alone are too short for vector instructions.
    mean = torch.tensor(dataset.mean).repeat(width)
    deviation = torch.tensor(dataset.std).repeat(width)
    for crop, mirrors, image in zip(crops, np.asarray(mirror.as_tensor()), images, strict=True):
        whole = torch.from_numpy(np.asarray(crop))[None].permute(0, 3, 1, 2)
        resized = F.interpolate(whole, size=size, mode="bilinear", antialias=True)
        if mirrors:
            resized = resized.flip(3)
        rows = image.view(height, -1)
        rows.copy_(resized.permute(0, 2, 3, 1).view(rows.shape)).sub_(mean).div_(deviation)
    corners = [np.asarray(each.as_tensor()) for each in boxes]
    if augment.cutout:
        _cover_(images, corners[0], np.full_like(corners[0], augment.cutout))
    if augment.erasing:
        _cover_(images, *corners[-2:])
    torch.set_num_threads(threads)
    return images


def _cover_(images: Tensor, corners: np.ndarray, sides: np.ndarray) -> None:
    """Set a box of each image (H, W, C) to 0."""
    begin, end = corners.astype(int), (corners + sides).astype(int)
    for image, (left, top), (right, bottom) in zip(images, begin, end, strict=True):
        image[top:bottom, left:right] = 0
