"""Random crops of images that lie in memory, by torch's operators on the device that holds them.

A GPU needs a few kernels for a batch. A DALI pipeline makes the same pixels, to the bit, but the
host must feed it in every step, which takes longer than a step of a small network. For the same
reason the batches of several steps are made at once.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from swap_hpc.data.dataset import Dataset
from swap_hpc.data.sampling import DRAWS, Picks
from swap_hpc.data.splits import Arrays
from swap_hpc.data.transfer import to_device
from swap_hpc.recipe.inputs import Augment

STEPS_AT_ONCE = 16
BYTES_AT_ONCE = 2**26  # of float32 images; always at least one batch


def crop_places(pick: Picks, augment: Augment, size: tuple[int, int]) -> np.ndarray:
    """Compute where each sample's crop lies in its padded image, and its cutout in the crop.

    Args:
        pick: n samples.
        augment: the padding, in which a crop moves, and the side of the cutout.
        size: (height, width) of the crop in pixels.

    Returns:
        (5, n) int64. The rows are the crop's column and row, whether it is mirrored (0 or 1), and
        the cutout's column and row.
    """
    u = draws(pick)
    height, width = size
    cutout_places = [width - augment.cutout + 1, height - augment.cutout + 1]
    crop = np.floor(u[:, :2] * (2 * augment.pad + 1))
    cutout = np.floor(u[:, 3:5] * cutout_places)
    return np.stack([*crop.T, mirrored(u, augment), *cutout.T]).astype(np.int64)


def draws(pick: Picks) -> np.ndarray:
    """Return a pick's random numbers, (n, DRAWS) float32; zeros where nothing is augmented."""
    if pick.draws is None:
        return np.zeros((len(pick.indices), DRAWS), np.float32)
    return pick.draws


def mirrored(u: np.ndarray, augment: Augment | None) -> np.ndarray:
    """Return (n,) int32, 1 for each image to mirror, by the random numbers `u` of `draws`."""
    flips = augment is not None and augment.flip
    return ((u[:, 2] >= 0.5) & flips).astype(np.int32)


def cropped(
    dataset: Dataset,
    split: Arrays,
    picks: Iterator[Picks],
    augment: Augment | None,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one batch for each of `picks`: cropped, mirrored, normalised, and cut out.

    The host sends one small tensor to the device for several batches, and does not wait for them.

    Args:
        dataset: whose mean and deviation normalise the images.
        split: the images, which stay on the device.
        picks: the samples of each batch.
        augment: what is done to an image; None: only normalisation.
        device: where the batches are made.

    Yields:
        Images (n, C, H, W) float32 in the layout channels_last, and their labels, on `device`.
    """
    settings = augment or Augment()
    images = split.on_device(settings.pad, device)  # (N, H + 2 pad, W + 2 pad, C) uint8
    labels = torch.from_numpy(split.labels).to(device)
    mean = torch.tensor(dataset.mean, dtype=torch.float32).to(device)
    scale = (1 / torch.tensor(dataset.std, dtype=torch.float32)).to(device)
    height, width = dataset.image_size
    rows, columns = torch.arange(height).to(device), torch.arange(width).to(device)
    for group in _grouped(picks, bytes_per_image=4 * height * width * dataset.channels):
        joined = Picks(
            np.concatenate([pick.indices for pick in group]),
            np.concatenate([draws(pick) for pick in group]),
        )
        places = crop_places(joined, settings, (height, width))
        # one transfer for all of it: each costs the host the same, however small
        sent = to_device(np.stack([joined.indices, *places]), device)
        sample, x, y, mirror, left, top = sent
        if augment is None:
            crops = images[sample]
        else:
            across = columns + x[:, None]
            if settings.flip:
                across = torch.where(mirror[:, None] == 1, across.flip(1), across)
            down = rows + y[:, None]
            crops = images[sample[:, None, None], down[:, :, None], across[:, None, :]]
        batch = crops.float().sub_(mean).mul_(scale)  # (n, H, W, C)
        if settings.cutout:
            covered_rows = _covered(rows, top, settings.cutout)
            covered_columns = _covered(columns, left, settings.cutout)
            covered = covered_rows[:, :, None] & covered_columns[:, None, :]
            batch.masked_fill_(covered[..., None], 0)
        sizes = [len(pick.indices) for pick in group]
        channels_last = batch.permute(0, 3, 1, 2)
        yield from zip(channels_last.split(sizes), labels[sample].split(sizes), strict=True)


def _grouped(picks: Iterator[Picks], bytes_per_image: int) -> Iterator[list[Picks]]:
    """Group the picks whose images are made at once, as many as fit."""
    for first in picks:
        bytes_per_batch = max(1, bytes_per_image * len(first.indices))
        steps = min(BYTES_AT_ONCE // bytes_per_batch, STEPS_AT_ONCE)
        yield [first, *islice(picks, max(0, steps - 1))]


def _covered(places: Tensor, first: Tensor, side: int) -> Tensor:
    """Return (n, places) bool: which rows, or columns, the cutout of each of n samples covers."""
    distance = places - first[:, None]
    return (distance >= 0) & (distance < side)
