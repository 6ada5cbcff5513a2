"""Image files and shards decoded once, into memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from nvidia.dali import fn
from nvidia.dali.pipeline import pipeline_def

from swap_hpc.data.encoded import Encoded, encoded, explain_decode_error, whole_image
from swap_hpc.data.pieces import FEWEST_PIXELS, HEADERS, Headers, pieces
from swap_hpc.data.sampling import Picks
from swap_hpc.errors import RunError, UserError

BATCH = 256


def image_shapes(split: Encoded, threads: int) -> np.ndarray:
    """(N, 3) int64: height, width and channels of images, from their headers. Raises UserError naming an unreadable one."""
    headers = Headers(split, threads)
    try:
        return np.concatenate([headers.shapes(pick.indices) for pick in _in_order(split, HEADERS)])
    except RunError as named:
        raise UserError(str(named)) from None


def decode(
    split: Encoded, size: tuple[int, int] | None, threads: int, pixels: int = FEWEST_PIXELS
) -> np.ndarray:
    """(N, H, W, 3) uint8, red, green, blue. Raises UserError naming an image that cannot be decoded.

    `size` (height, width): the shorter side resized to fit, the centre cropped; None: as they are, which must be one size.
    `pixels`: how many are decoded at once; always one image.
    """
    fed = (piece.sources for piece in pieces(split, _in_order(split, BATCH), pixels, threads, size))

    def graph() -> Any:
        image = whole_image(encoded(split, fn.external_source(fed, batch=True)))
        if size is None:
            return image
        image = fn.resize(
            image, resize_y=float(size[0]), resize_x=float(size[1]), mode="not_smaller"
        )
        return fn.crop(image, crop=size)

    try:
        return _run(graph, split, threads)
    except RunError as named:
        raise UserError(str(named)) from None


def _in_order(split: Encoded, batch: int) -> Iterator[Picks]:
    for start in range(0, len(split), batch):
        yield Picks(np.arange(start, min(start + batch, len(split))), None)


def _run(graph: Any, split: Encoded, threads: int) -> np.ndarray:
    """All outputs of a graph, one after the other. Raises RunError naming an image that cannot be read."""
    pipeline = pipeline_def(graph)(batch_size=BATCH, num_threads=threads, device_id=None)
    done, result = 0, np.empty(0)
    while True:
        try:
            (output,) = pipeline.run()
        except StopIteration:
            return result
        except RunError:
            raise
        except RuntimeError as error:
            del pipeline
            explain_decode_error(split, range(done, len(split)), error)
            raise
        batch = np.array(output.as_tensor())
        if done == 0:
            result = np.empty((len(split), *batch.shape[1:]), batch.dtype)
        result[done : done + len(batch)] = batch
        done += len(batch)
