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
from swap_hpc.data.places import crop_places, draws
from swap_hpc.data.sampling import Picks
from swap_hpc.data.splits import Arrays
from swap_hpc.data.transfer import as_tensor, to_device
from swap_hpc.recipe.augment import Augment

STEPS_AT_ONCE = 16
BYTES_AT_ONCE = 2**26  # of float32 images; always at least one batch


def is_simple(augment: Augment | None) -> bool:
    """Tell whether `cropped` can do all that an augmentation asks for."""
    return augment is None or not (augment.crop_area or augment.operates or augment.erasing)


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
    labels = as_tensor(split.labels).to(device)
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
