"""Where images are cropped, mirrored and covered: numbers on the host, from the random draws."""

import numpy as np

from swap_hpc.data.sampling import DRAWS, Picks
from swap_hpc.recipe.augment import Augment

# Which of mixup and CutMix, how much of each image, and the x and y of a box.
MIX_DRAWS = 4

# Whether an image is erased, and the area, aspect ratio, x and y of the box.
ERASING_DRAWS = 5

# In each round: which operation, its sign, its magnitude.
POLICY_DRAWS = 3

# Of each operation: its place in the order, and its factor.
JITTER_DRAWS = 2


def streams_of(augment: Augment) -> dict[str, int]:
    """Return how many random numbers per sample an augmentation takes from each stream."""
    streams = {}
    if augment.cutout and augment.crop_area:
        streams["cutout"] = 2
    if augment.erasing:
        streams["erasing"] = ERASING_DRAWS
    if rounds := augment.policy_rounds:
        streams["policy"] = POLICY_DRAWS * rounds
    if jitters := augment.jitters:
        streams["jitter"] = JITTER_DRAWS * len(jitters)
    if augment.mixes:
        streams["mix"] = MIX_DRAWS
    return streams


def draws(pick: Picks) -> np.ndarray:
    """Return a pick's random numbers, (n, DRAWS) float32; zeros where nothing is augmented."""
    if pick.draws is None:
        return np.zeros((len(pick.indices), DRAWS), np.float32)
    return pick.draws


def more_draws(pick: Picks, stream: str, count: int) -> np.ndarray:
    """Return a pick's random numbers of a stream, (n, count) float32; zeros where there is none."""
    if stream in pick.more:
        return pick.more[stream]
    return np.zeros((len(pick.indices), count), np.float32)


def mirrored(u: np.ndarray, augment: Augment | None) -> np.ndarray:
    """Return (n,) int32, 1 for each image to mirror, by the random numbers `u` of `draws`."""
    flips = augment is not None and augment.flip
    return ((u[:, 2] >= 0.5) & flips).astype(np.int32)


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
    crop, cutout = crop_corners(u, augment), cutout_corners(pick, augment, size)
    return np.stack([*crop.T, mirrored(u, augment), *cutout.T]).astype(np.int64)


def crop_corners(u: np.ndarray, augment: Augment) -> np.ndarray:
    """Return (n, 2) float32: the column and row of each crop, by the random numbers `u`."""
    return np.floor(u[:, :2] * np.float32(2 * augment.pad + 1))


def cutout_corners(pick: Picks, augment: Augment, size: tuple[int, int]) -> np.ndarray:
    """Return (n, 2): the column and row of each cutout."""
    # the last two draws have another use where a crop is resized
    u = more_draws(pick, "cutout", 2) if augment.crop_area else draws(pick)[:, 3:5]
    height, width = size
    return np.floor(u * [width - augment.cutout + 1, height - augment.cutout + 1])


def random_crops(pick: Picks, augment: Augment) -> dict[str, np.ndarray]:
    """Compute the random crops that are resized to the image size.

    Returns:
        Each float32: `share` (n,), the crop's area as a fraction of the image's; `aspect` (n,), its
        width / height; and `place` (n, 2), its row and column as a fraction of those that it may
        have.
    """
    assert augment.crop_area
    u = draws(pick)
    low, high = augment.crop_area
    narrow, wide = augment.crop_ratio
    share = low + u[:, 3] * (high - low)
    aspect = np.exp(np.log(narrow) + u[:, 4] * np.log(wide / narrow))
    return {"share": float32(share), "aspect": float32(aspect), "place": u[:, 1::-1].copy()}


def erased(pick: Picks, augment: Augment, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Compute the boxes of random erasing (Zhong et al., arXiv 1708.04896), some of them empty.

    A box that does not fit is cut to the image's size, where torchvision draws again.

    Returns:
        The boxes' corners (column, row) and their sides (width, height), both (n, 2) float32.
    """
    u = more_draws(pick, "erasing", ERASING_DRAWS).astype(np.float64)
    extent = np.array(size[::-1])  # (width, height)
    low, high = augment.erasing_area
    narrow, wide = augment.erasing_ratio
    area = (low + u[:, 1] * (high - low)) * extent.prod()
    aspect = np.exp(np.log(narrow) + u[:, 2] * np.log(wide / narrow))
    wanted = np.sqrt(np.stack([area * aspect, area / aspect], 1))
    sides = np.clip(np.floor(wanted + 0.5), 1, extent)
    corners = np.floor(u[:, 3:] * (extent - sides + 1))
    is_erased = u[:, :1] < augment.erasing
    return float32(corners * is_erased), float32(sides * is_erased)


def float32(values: np.ndarray) -> np.ndarray:
    """Return values as DALI takes them in: float32, C-contiguous."""
    return np.ascontiguousarray(values, dtype=np.float32)
