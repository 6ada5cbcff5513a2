"""Image files decoded once, into memory, and the file that cannot be decoded named."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def

from swap_hpc.errors import RunError, UserError

BATCH = 256


def path_bytes(path: str) -> np.ndarray:
    """A path as DALI's file reader takes it, (bytes,) uint8."""
    return np.frombuffer(path.encode(), dtype=np.uint8)


def image_shapes(paths: Sequence[str], threads: int) -> np.ndarray:
    """(N, 3) int64: height, width and channels of image files, from their headers. Raises UserError naming an unreadable one."""

    def graph() -> Any:
        return fn.peek_image_shape(fn.io.file.read(fn.external_source(_fed(paths), batch=True)))

    return _run(graph, paths, threads)


def decode(paths: Sequence[str], size: tuple[int, int] | None, threads: int) -> np.ndarray:
    """(N, H, W, 3) uint8, red, green, blue. Raises UserError naming an image that cannot be decoded.

    `size` (height, width): the shorter side resized to fit, the centre cropped; None: as they are, which must be one size.
    """

    def graph() -> Any:
        encoded = fn.io.file.read(fn.external_source(_fed(paths), batch=True))
        image = fn.decoders.image(encoded, output_type=types.RGB)
        if size is None:
            return image
        image = fn.resize(image, resize_y=float(size[0]), resize_x=float(size[1]), mode="not_smaller")
        return fn.crop(image, crop=size)

    return _run(graph, paths, threads)


def explain_decode_error(paths: Sequence[str], error: Exception) -> None:
    """Raises RunError naming the first of `paths` that cannot be decoded; returns where all can be."""
    for path in paths:
        reason = _unreadable(path)
        if reason:
            raise RunError(f"cannot decode the image {path} ({reason}): replace or remove the file") from error


def _fed(paths: Sequence[str]) -> Iterator[list[np.ndarray]]:
    for start in range(0, len(paths), BATCH):
        yield [path_bytes(path) for path in paths[start : start + BATCH]]


def _run(graph: Any, paths: Sequence[str], threads: int) -> np.ndarray:
    pipeline = pipeline_def(graph)(batch_size=BATCH, num_threads=threads, device_id=None)
    done, result = 0, np.empty(0)
    while True:
        try:
            (output,) = pipeline.run()
        except StopIteration:
            return result
        except RuntimeError as error:
            try:
                explain_decode_error(paths[done:], error)
            except RunError as named:
                raise UserError(str(named)) from None
            raise
        batch = np.array(output.as_tensor())
        if done == 0:
            result = np.empty((len(paths), *batch.shape[1:]), batch.dtype)
        result[done : done + len(batch)] = batch
        done += len(batch)


def _unreadable(path: str) -> str | None:
    """Why the image at `path` cannot be decoded; None where it can be."""
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                return "the file is empty"
    except OSError as error:
        return error.strerror or "it cannot be read"
    try:
        pipeline_def(lambda: fn.decoders.image(fn.io.file.read(fn.external_source([[path_bytes(path)]], batch=True))))(
            batch_size=1, num_threads=1, device_id=None
        ).run()
    except RuntimeError:
        return "not an image that DALI decodes, or damaged"
    return None
