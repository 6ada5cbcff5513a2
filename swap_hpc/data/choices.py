"""Which operations change the pixels of each image, and how much: numbers on the host.

An image goes through rounds. In each, one of several operations is chosen for it, with a parameter.
RandAugment (Cubuk et al., arXiv 1909.13719) and TrivialAugment (Mueller and Hutter, arXiv
2103.10158) have the operations and magnitudes of torchvision's `RandAugment` and
`TrivialAugmentWide`; colour jitter is that of torchvision's `ColorJitter`.
"""

from dataclasses import dataclass

import numpy as np

from swap_hpc.data.places import JITTER_DRAWS, POLICY_DRAWS, float32, more_draws
from swap_hpc.data.sampling import Picks
from swap_hpc.recipe.augment import Augment

# What RandAugment and TrivialAugment choose from.
POLICY = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "saturation",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "auto_contrast",
    "equalize",
)
MAGNITUDES = 31  # TrivialAugment draws one of so many; RandAugment's is one of them


@dataclass(frozen=True)
class Round:
    """One operation for each of n images.

    Attributes:
        operations: the names of those that may be chosen.
        chosen: (n,) int32, the number of the chosen one in `operations`.
        parameters: (n,) float32, what `data.operations` takes.
    """

    operations: tuple[str, ...]
    chosen: np.ndarray
    parameters: np.ndarray


@dataclass(frozen=True)
class Ranges:
    """The largest magnitudes of a policy."""

    shear: float  # pixels to the side per pixel down
    translate: tuple[float, float]  # pixels in x and in y
    rotate: float  # degrees
    enhance: float  # brightness and the like: away from 1
    posterize: int  # bits that are removed


def choices(pick: Picks, augment: Augment, size: tuple[int, int]) -> list[Round]:
    """Choose the operations for the samples of a pick, whose images have `size` (height, width)."""
    return [*_policy(pick, augment, size), *_jitter(pick, augment)]


def _policy(pick: Picks, augment: Augment, size: tuple[int, int]) -> list[Round]:
    number = augment.policy_rounds
    draws = more_draws(pick, "policy", POLICY_DRAWS * number)
    found = []
    for one in range(number):
        u, sign, strength = draws[:, POLICY_DRAWS * one : POLICY_DRAWS * (one + 1)].T
        chosen = np.floor(u * len(POLICY)).astype(np.int32)
        magnitude = np.full(len(u), augment.randaugment_magnitude)
        if augment.trivial_augment:
            magnitude = np.floor(strength * MAGNITUDES).astype(int)
        table = _parameters(magnitude, np.where(sign < 0.5, -1, 1), _ranges(augment, size))
        found.append(Round(POLICY, chosen, float32(table[chosen, np.arange(len(u))])))
    return found


def _ranges(augment: Augment, size: tuple[int, int]) -> Ranges:
    if augment.trivial_augment:
        return Ranges(0.99, (32, 32), 135, 0.99, 6)
    height, width = size
    return Ranges(0.3, (150 / 331 * width, 150 / 331 * height), 30, 0.9, 4)


def _parameters(magnitude: np.ndarray, sign: np.ndarray, ranges: Ranges) -> np.ndarray:
    """Return the parameter of each operation of `POLICY` for each image, (operations, n)."""
    strength = magnitude / (MAGNITUDES - 1)
    either, enhanced = sign * strength, 1 + sign * strength * ranges.enhance
    across, down = (np.trunc(either * pixels) for pixels in ranges.translate)
    mask = 256 - 2 ** np.round(strength * ranges.posterize)
    nothing = np.zeros(len(strength))
    table = {
        "identity": nothing,
        "shear_x": either * ranges.shear,
        "shear_y": either * ranges.shear,
        "translate_x": across,
        "translate_y": down,
        "rotate": either * ranges.rotate,
        "brightness": enhanced,
        "saturation": enhanced,
        "contrast": enhanced,
        "sharpness": enhanced,
        "posterize": mask,
        "solarize": 255 * (1 - strength),
        "auto_contrast": nothing,
        "equalize": nothing,
    }
    return np.stack([table[name] for name in POLICY])


def _jitter(pick: Picks, augment: Augment) -> list[Round]:
    """Apply all jitters in a random order, each by a factor of its own."""
    names = augment.jitters
    draws = more_draws(pick, "jitter", JITTER_DRAWS * len(names))
    order = np.argsort(draws[:, : len(names)], axis=1, kind="stable").astype(np.int32)
    factors = np.empty((len(draws), len(names)))
    for number, name in enumerate(names):
        u, width = draws[:, len(names) + number], getattr(augment, name)
        low = -width if name == "hue" else max(0.0, 1 - width)
        high = width if name == "hue" else 1 + width
        factors[:, number] = low + u * (high - low)
    rows = np.arange(len(draws))
    return [Round(names, chosen, float32(factors[rows, chosen])) for chosen in order.T.copy()]
