"""Image files and shards, decoded once into memory, and their shapes."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from nvidia.dali import fn
from nvidia.dali.pipeline import pipeline_def

from swap_hpc.data.encoded import (
    Encoded,
    centre_of,
    decode_whole,
    explain_decode_error,
    file_content,
)
from swap_hpc.data.pieces import HEADERS_AT_ONCE, MIN_PIXELS, Headers, pieces
from swap_hpc.data.sampling import Picks
from swap_hpc.errors import RunError, UserError

BATCH = 256  # images per step of the pipeline, before they are cut into pieces


def image_shapes(split: Encoded, threads: int) -> np.ndarray:
    """Return (N, 3) int64: height, width and channels of each image, from its header.

    Raises:
        UserError: an image cannot be read; it is named.
    """
    headers = Headers(split, threads)
    try:
        shapes = [headers.shapes(pick.indices) for pick in _in_order(split, HEADERS_AT_ONCE)]
    except RunError as named:
        raise UserError(str(named)) from None
    return np.concatenate(shapes)


def decode(
    split: Encoded, size: tuple[int, int] | None, threads: int, pixels: int = MIN_PIXELS
) -> np.ndarray:
    """Decode all images of a split.

    Args:
        split: the images.
        size: (height, width) in pixels. The shorter side is resized to fit, and the centre is
            cropped. None: the images' own size, which must then be one for all.
        threads: CPU threads.
        pixels: the most pixels that are decoded at once; always at least one image.

    Returns:
        (N, H, W, 3) uint8: red, green, blue.

    Raises:
        UserError: an image cannot be decoded; it is named.
    """
    parts = pieces(split, _in_order(split, BATCH), pixels, threads, size)
    sources = (piece.sources for piece in parts)

    def graph() -> Any:
        image = decode_whole(file_content(split, fn.external_source(sources, batch=True)))
        return image if size is None else centre_of(image, size)

    try:
        return _run(graph, split, threads)
    except RunError as named:
        raise UserError(str(named)) from None


def _in_order(split: Encoded, batch: int) -> Iterator[Picks]:
    for start in range(0, len(split), batch):
        yield Picks(np.arange(start, min(start + batch, len(split))), None)


def _run(graph: Callable[[], Any], split: Encoded, threads: int) -> np.ndarray:
    """Return all outputs of a graph in one array, an entry for each sample.

    Raises:
        RunError: an image cannot be read or decoded; it is named.
    """
    pipeline = pipeline_def(graph)(batch_size=BATCH, num_threads=threads, device_id=None)
    done, result = 0, np.empty(0)
    while True:
        try:
            (output,) = pipeline.run()
        except StopIteration:
            return result
        except RunError:  # it names what cannot be read
            raise
        except RuntimeError as error:
            del pipeline  # frees its threads and buffers before another one is built
            explain_decode_error(split, range(done, len(split)), error)
            raise
        batch = np.array(output.as_tensor())
        if done == 0:
            # one array from the start: a list of batches to join would take twice the memory
            result = np.empty((len(split), *batch.shape[1:]), batch.dtype)
        result[done : done + len(batch)] = batch
        done += len(batch)
