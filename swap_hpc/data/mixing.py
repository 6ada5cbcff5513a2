"""Mixup and CutMix: two images become mixtures of each other, and so do their labels.

Mixup: Zhang et al., arXiv 1710.09412. CutMix: Yun et al., arXiv 1905.04899. A batch's order is
random, so neighbours in it are a random pair. What a pair draws belongs to its first sample: the
mixtures do not depend on the number of ranks, as long as each holds whole pairs.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from swap_hpc.data.places import MIX_DRAWS, more_draws
from swap_hpc.data.sampling import Picks
from swap_hpc.data.transfer import to_device
from swap_hpc.errors import UserError
from swap_hpc.recipe.augment import Augment


@dataclass(frozen=True)
class Mixtures:
    """How each of n pairs is mixed.

    Attributes:
        share: (n,) float32, the share of an image's own label in its target.
        blend: (n,) float32, the share of an image's own pixels where they are blended.
        boxes: (n, 4) int64, the left, top, right and bottom of the box, right and bottom exclusive,
            in which a pair swaps its pixels; empty boxes where they are blended.
    """

    share: np.ndarray
    blend: np.ndarray
    boxes: np.ndarray

    @classmethod
    def drawn(cls, pick: Picks, augment: Augment, size: tuple[int, int]) -> "Mixtures":
        """Compute the mixtures of the pairs of a pick, of images of `size` (height, width)."""
        # scipy takes a moment to import, and only these need it
        from scipy.special import betaincinv  # type: ignore[import-untyped]

        u = more_draws(pick, "mix", MIX_DRAWS)[::2].astype(np.float64)
        is_cut = u[:, 0] < augment.share_of_cutmix
        alpha = np.where(is_cut, augment.cutmix or 1, augment.mixup or 1)
        share = betaincinv(alpha, alpha, u[:, 1])  # of the beta distribution: its inverse
        boxes = _boxes(share, u[:, 2:], size) * is_cut[:, None]
        left, top, right, bottom = boxes.T
        outside = 1 - (right - left) * (bottom - top) / (size[0] * size[1])
        return cls(
            np.where(is_cut, outside, share).astype(np.float32),
            np.where(is_cut, 1, share).astype(np.float32),
            boxes,
        )


def _boxes(share: np.ndarray, places: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return boxes of `1 - share` of the area around random centres, cut off at the edges."""
    extent = np.array(size[::-1])  # (width, height)
    half = np.floor(0.5 * np.sqrt(1 - share)[:, None] * extent)
    centre = np.floor(places * extent)
    first, last = np.maximum(centre - half, 0), np.minimum(centre + half, extent)
    return np.concatenate([first, last], 1).astype(np.int64)


def noted(picks: Iterator[Picks], taken: deque[Picks]) -> Iterator[Picks]:
    """Yield the picks, noting each that is taken."""
    for pick in picks:
        taken.append(pick)
        yield pick


def mixed(
    batches: Iterator[tuple[Tensor, Tensor]],
    taken: deque[Picks],
    augment: Augment,
    classes: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Mix the pairs of neighbours in each batch.

    Args:
        batches: images (n, C, H, W) float32 and labels (n,) int64.
        taken: the picks of the batches to come, which are removed from it.
        augment: what is mixed, and how much.
        classes: the number of classes.

    Yields:
        Images like those taken in, and targets (n, classes) float32, each label's share.

    Raises:
        UserError: n is odd.
    """
    for images, labels in batches:
        pick = taken.popleft()
        if len(labels) % 2:
            raise UserError(
                f"augment.mixup and augment.cutmix mix pairs of images: a rank's share of "
                f"{len(labels)} images is odd; set a batch size that gives an even one"
            )
        mixtures = Mixtures.drawn(pick, augment, (images.shape[2], images.shape[3]))
        yield mixed_images(images, mixtures), mixed_targets(labels, mixtures, classes)


def mixed_images(images: Tensor, mixtures: Mixtures) -> Tensor:
    """Return the mixtures of pairs of neighbours; (n, C, H, W), in the layout channels_last."""
    pairs = images.permute(0, 2, 3, 1).unflatten(0, (-1, 2))  # (n / 2, 2, H, W, C)
    others = pairs.flip(1)
    result = pairs
    if (mixtures.blend < 1).any():
        blend = _per_pair(mixtures.blend, pairs)
        result = blend * pairs + (1 - blend) * others
    if mixtures.boxes.any():
        inside = _inside(mixtures.boxes, images)[:, None, :, :, None]
        result = torch.where(inside, others, result)
    return result.flatten(0, 1).permute(0, 3, 1, 2)


def mixed_targets(labels: Tensor, mixtures: Mixtures, classes: int) -> Tensor:
    """Return the shares of the classes in each mixture, (n, classes) float32."""
    pairs = F.one_hot(labels, classes).float().unflatten(0, (-1, 2))
    share = _per_pair(mixtures.share, pairs)
    return (share * pairs + (1 - share) * pairs.flip(1)).flatten(0, 1)


def _per_pair(values: np.ndarray, pairs: Tensor) -> Tensor:
    """Return a number for each pair as a tensor that broadcasts over `pairs`."""
    return to_device(values, pairs.device).reshape(-1, *[1] * (pairs.ndim - 1))


def _inside(boxes: np.ndarray, images: Tensor) -> Tensor:
    """Return (n, H, W) bool: which pixels lie in the box of each of n pairs."""
    *_, height, width = images.shape
    left, top, right, bottom = to_device(boxes, images.device).T[..., None]
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    in_rows = (rows >= top) & (rows < bottom)
    in_columns = (columns >= left) & (columns < right)
    return in_rows[:, :, None] & in_columns[:, None, :]
