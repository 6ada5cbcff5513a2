"""Image files decoded once, into memory, and the file that cannot be decoded named."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def

from swap_hpc.data.splits import Files, Shards
from swap_hpc.errors import RunError, UserError

Encoded: TypeAlias = Files | Shards

BATCH = 256


def encoded(split: Encoded, source: Any) -> Any:
    """In a DALI graph, the encoded images from what `split.sources` gives."""
    return fn.io.file.read(source) if isinstance(split, Files) else source


def whole_image(file: Any, device: str = "cpu") -> Any:
    """In a DALI graph, the decoded image (H, W, 3) uint8.

    The size is read first: DALI's decoder (2.4.0) sometimes ends the process where a header in its batch is damaged, by
    leaving while its threads go on; `peek_image_shape` fails as it should.
    """
    size = fn.peek_image_shape(file, dtype=types.INT32)[:2]
    return fn.decoders.image_slice(file, end=size, axis_names="HW", device=device, output_type=types.RGB)


def image_shapes(split: Encoded, threads: int) -> np.ndarray:
    """(N, 3) int64: height, width and channels of images, from their headers. Raises UserError naming an unreadable one."""

    def graph() -> Any:
        return fn.peek_image_shape(encoded(split, fn.external_source(_fed(split), batch=True)))

    return _run(graph, split, threads)


def decode(split: Encoded, size: tuple[int, int] | None, threads: int) -> np.ndarray:
    """(N, H, W, 3) uint8, red, green, blue. Raises UserError naming an image that cannot be decoded.

    `size` (height, width): the shorter side resized to fit, the centre cropped; None: as they are, which must be one size.
    """

    def graph() -> Any:
        image = whole_image(encoded(split, fn.external_source(_fed(split), batch=True)))
        if size is None:
            return image
        image = fn.resize(image, resize_y=float(size[0]), resize_x=float(size[1]), mode="not_smaller")
        return fn.crop(image, crop=size)

    return _run(graph, split, threads)


def explain_decode_error(split: Encoded, samples: Iterable[int], error: Exception) -> None:
    """Raises RunError naming the first of `samples` that cannot be decoded; returns where all can be."""
    asked: list[int] = []

    def one_by_one() -> Iterator[list[np.ndarray]]:
        for sample in samples:
            asked.append(sample)
            _check_readable(split, sample)
            yield split.sources([sample])

    def graph() -> Any:
        return whole_image(encoded(split, fn.external_source(one_by_one(), batch=True)))

    pipeline = pipeline_def(graph)(  # nothing ahead: the one asked for last is the one that fails
        batch_size=1, num_threads=1, device_id=None, exec_async=False, exec_pipelined=False, prefetch_queue_depth=1
    )
    try:
        while True:
            pipeline.run()
    except StopIteration:
        return
    except OSError as unreadable:
        reason = unreadable.strerror or "it cannot be read"
    except RunError:  # a shard that cannot be read
        raise
    except RuntimeError:
        reason = "not an image that DALI decodes, or damaged"
    raise RunError(f"cannot decode the image {split.name(asked[-1])} ({reason}): replace or remove the file") from error


def _fed(split: Encoded) -> Iterator[list[np.ndarray]]:
    for start in range(0, len(split), BATCH):
        yield split.sources(range(start, min(start + BATCH, len(split))))


def _run(graph: Any, split: Encoded, threads: int) -> np.ndarray:
    pipeline = pipeline_def(graph)(batch_size=BATCH, num_threads=threads, device_id=None)
    done, result = 0, np.empty(0)
    while True:
        try:
            (output,) = pipeline.run()
        except StopIteration:
            return result
        except RuntimeError as error:
            del pipeline
            try:
                explain_decode_error(split, range(done, len(split)), error)
            except RunError as named:
                raise UserError(str(named)) from None
            raise
        batch = np.array(output.as_tensor())
        if done == 0:
            result = np.empty((len(split), *batch.shape[1:]), batch.dtype)
        result[done : done + len(batch)] = batch
        done += len(batch)


def _check_readable(split: Encoded, sample: int) -> None:
    """Raises OSError where an image is empty or cannot be read."""
    if isinstance(split, Shards):
        return
    with open(split.paths[sample], "rb") as file:
        if not file.read(1):
            raise OSError(0, "the file is empty")
