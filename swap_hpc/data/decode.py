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


def image_shapes(split: Encoded, rows: range, threads: int) -> np.ndarray:
    """Return (n, 3) int64: height, width and channels of n consecutive images, from their headers.

    Raises:
        UserError: an image cannot be read; it is named.
    """
    headers = Headers(split, threads)
    shapes = [np.empty((0, 3), np.int64)]
    try:
        shapes += [headers.shapes(pick.indices) for pick in _in_order(rows, HEADERS_AT_ONCE)]
    except RunError as named:
        raise UserError(str(named)) from None
    return np.concatenate(shapes)


def decode(
    split: Encoded, size: tuple[int, int] | None, threads: int, pixels: int = MIN_PIXELS
) -> np.ndarray:
    """Decode all images of a split.

    Args:
        split: the images.
        size: as in `decode_into`.
        threads: CPU threads.
        pixels: as in `decode_into`.

    Returns:
        (N, H, W, 3) uint8: red, green, blue.

    Raises:
        UserError: an image cannot be decoded; it is named.
    """
    height, width = size or image_shapes(split, range(1), threads)[0, :2]
    images = np.empty((len(split), height, width, 3), np.uint8)
    decode_into(images, split, range(len(split)), size, threads, pixels)
    return images


def decode_into(
    images: np.ndarray,
    split: Encoded,
    rows: range,
    size: tuple[int, int] | None,
    threads: int,
    pixels: int,
) -> None:
    """Decode some consecutive images of a split into an array for all of them.

    Args:
        images: (N, H, W, 3) uint8, for red, green, blue.
        split: the N encoded images.
        rows: the images to decode.
        size: (height, width) in pixels. The shorter side is resized to fit, and the centre is
            cropped. None: the images' own size, which must then be one for all.
        threads: CPU threads.
        pixels: the most pixels that are decoded at once; always at least one image.

    Raises:
        UserError: an image cannot be decoded; it is named.
    """
    if not rows:
        return
    parts = pieces(split, _in_order(rows, BATCH), pixels, threads, size)
    sources = (piece.sources for piece in parts)

    def graph() -> Any:
        image = decode_whole(file_content(split, fn.external_source(sources, batch=True)))
        return image if size is None else centre_of(image, size)

    done = rows.start
    try:
        for batch in _run(graph, split, rows, threads):
            images[done : done + len(batch)] = batch
            done += len(batch)
    except RunError as named:
        raise UserError(str(named)) from None


def _in_order(rows: range, batch: int) -> Iterator[Picks]:
    for start in range(rows.start, rows.stop, batch):
        yield Picks(np.arange(start, min(start + batch, rows.stop)), None)


def _run(
    graph: Callable[[], Any], split: Encoded, rows: range, threads: int
) -> Iterator[np.ndarray]:
    """Yield the outputs of a graph, an entry for each of `rows`; each is valid until the next.

    Raises:
        RunError: an image cannot be read or decoded; it is named.
    """
    pipeline = pipeline_def(graph)(batch_size=BATCH, num_threads=threads, device_id=None)
    done = rows.start
    while True:
        try:
            (output,) = pipeline.run()
        except StopIteration:
            return
        except RunError:  # it names what cannot be read
            raise
        except RuntimeError as error:
            del pipeline  # frees its threads and buffers before another one is built
            explain_decode_error(split, range(done, rows.stop), error)
            raise
        batch = np.asarray(output.as_tensor())
        done += len(batch)
        yield batch
