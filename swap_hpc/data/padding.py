"""Images padded by reflection, in which random crops move."""

from collections.abc import Iterator

import numpy as np

AT_ONCE = 1024  # images that have a second copy while they are padded


def reflected(images: np.ndarray, pad: int) -> np.ndarray:
    """Return a copy of images (N, H, W, C), padded by `pad` pixels on each side."""
    return np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")


def inside(frame: np.ndarray, pad: int) -> np.ndarray:
    """Return the part of padded images (N, H + 2 pad, W + 2 pad, C) that is not padding."""
    return frame[:, pad : frame.shape[1] - pad, pad : frame.shape[2] - pad]


def reflect_(frame: np.ndarray, pad: int, rows: range) -> None:
    """Fill in the padding of some of the images in a frame (N, H + 2 pad, W + 2 pad, C)."""
    if pad:
        for some in in_parts(rows):
            frame[some] = reflected(inside(frame[some], pad), pad)


def in_parts(rows: range) -> Iterator[slice]:
    """Cut consecutive rows into slices of at most `AT_ONCE`."""
    for start in range(rows.start, rows.stop, AT_ONCE):
        yield slice(start, min(start + AT_ONCE, rows.stop))
