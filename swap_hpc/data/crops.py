"""Random crops of images that lie in memory, by torch's operators on the device that holds them.

A GPU needs a few kernels for that. A DALI pipeline makes the same pixels, to the bit, but has to be fed from the host
in every step, which takes longer than a step of a small network. For the same reason the batches of several steps are
made at once.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from swap_hpc.data.sampling import DRAWS, Picks
from swap_hpc.data.splits import Arrays, Dataset
from swap_hpc.recipe.schema import Augment

STEPS_AT_ONCE = 16
BYTES_AT_ONCE = 2**26  # of float32 images, but at least one batch


def crop_places(pick: Picks, augment: Augment, size: tuple[int, int]) -> np.ndarray:
    """Where each sample's crop lies in its padded image, and its cutout in the crop: (5, n) int64.

    The rows are the crop's column and row, whether it is mirrored (0 or 1), and the column and the row of its cutout.
    `size`: of the crop, (height, width) in pixels.
    """
    u = draws(pick)
    height, width = size
    room = [width - augment.cutout + 1, height - augment.cutout + 1]
    crop = np.floor(u[:, :2] * (2 * augment.pad + 1))
    hole = np.floor(u[:, 3:5] * room)
    return np.stack([*crop.T, mirrored(u, augment), *hole.T]).astype(np.int64)


def draws(pick: Picks) -> np.ndarray:
    """(n, DRAWS) float32; zeros where nothing is augmented."""
    return (
        pick.draws if pick.draws is not None else np.zeros((len(pick.indices), DRAWS), np.float32)
    )


def mirrored(u: np.ndarray, augment: Augment | None) -> np.ndarray:
    """(n,) int32: 1 for the images to mirror. `u`: as of `draws`."""
    return ((u[:, 2] >= 0.5) & bool(augment and augment.flip)).astype(np.int32)


def cropped(
    dataset: Dataset,
    split: Arrays,
    picks: Iterator[Picks],
    augment: Augment | None,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What `picks` names, one batch after the other, on `device`: images (n, C, H, W) float32 as channels_last, and labels.

    Cropped, mirrored, normalised by the data set's mean and deviation, and cut out; `augment` None: the whole images,
    normalised. The host sends one small tensor for several batches, and does not wait for them.
    """
    settings = augment or Augment()
    images = split.on_device(settings.pad, device)  # (N, H + 2 pad, W + 2 pad, C) uint8
    labels = torch.from_numpy(split.labels).to(device)
    mean = torch.tensor(dataset.mean, dtype=torch.float32).to(device)
    scale = (1 / torch.tensor(dataset.std, dtype=torch.float32)).to(device)
    height, width = dataset.image_size
    rows, columns = torch.arange(height).to(device), torch.arange(width).to(device)
    bytes_of_image = 4 * height * width * dataset.channels
    for several in _at_once(picks, bytes_of_image):
        together = Picks(
            np.concatenate([pick.indices for pick in several]),
            np.concatenate([draws(pick) for pick in several]),
        )
        places = crop_places(together, settings, (height, width))
        where, x, y, mirror, left, top = to_device(np.stack([together.indices, *places]), device)
        if augment is None:
            crop = images[where]
        else:
            across = columns + x[:, None]
            if settings.flip:
                across = torch.where(mirror[:, None] == 1, across.flip(1), across)
            crop = images[
                where[:, None, None], (rows + y[:, None])[:, :, None], across[:, None, :]
            ]  # (n, H, W, C)
        batch = crop.float().sub_(mean).mul_(scale)
        if settings.cutout:
            covered_rows, covered_columns = (
                _hole(rows, top, settings.cutout),
                _hole(columns, left, settings.cutout),
            )
            batch.masked_fill_(
                (covered_rows[:, :, None] & covered_columns[:, None, :])[..., None], 0
            )
        sizes = [len(pick.indices) for pick in several]
        yield from zip(
            batch.permute(0, 3, 1, 2).split(sizes), labels[where].split(sizes), strict=True
        )


def _at_once(picks: Iterator[Picks], bytes_of_image: int) -> Iterator[list[Picks]]:
    """The picks in lists, as long as fit into memory together."""
    for first in picks:
        fitting = BYTES_AT_ONCE // max(1, bytes_of_image * len(first.indices))
        yield [first, *islice(picks, max(0, min(fitting, STEPS_AT_ONCE) - 1))]


def _hole(places: Tensor, first: Tensor, side: int) -> Tensor:
    """(n, places) bool: which of the rows, or columns, each sample's cutout covers."""
    from_first = places - first[:, None]
    return (from_first >= 0) & (from_first < side)


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy on a device; of a GPU's the host does not wait for it, and may use its own again at once."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)
