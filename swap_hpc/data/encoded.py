"""Encoded images as DALI's graphs take them, and the one that cannot be decoded named."""

import io
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from PIL import Image

from swap_hpc.data.splits import Files, Shards
from swap_hpc.errors import RunError

Encoded: TypeAlias = Files | Shards


def encoded(split: Encoded, source: Any) -> Any:
    """In a DALI graph, the encoded images from what `split.sources` gives."""
    return fn.io.file.read(source) if isinstance(split, Files) else source


def whole_image(file: Any, device: str = "cpu") -> Any:
    """In a DALI graph, the decoded image (H, W, 3) uint8.

    The size is read first: DALI's decoder (2.4.0) sometimes ends the process where a header in its batch is damaged, by
    leaving while its threads go on; `peek_image_shape` fails as it should.
    """
    size = fn.peek_image_shape(file, dtype=types.INT32)[:2]
    return fn.decoders.image_slice(
        file,
        end=size,
        axis_names="HW",
        device=device,
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,
    )


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
        batch_size=1,
        num_threads=1,
        device_id=None,
        exec_async=False,
        exec_pipelined=False,
        prefetch_queue_depth=1,
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
        if kind := _whole_for_pillow(split, asked[-1]):
            refused = f"DALI does not decode this valid {kind} file ({split.name(asked[-1])})"
            raise RunError(f"{refused}: convert it, for example to PNG") from error
    raise RunError(
        f"cannot decode the image {split.name(asked[-1])} ({reason}): replace or remove the file"
    ) from error


def _whole_for_pillow(split: Encoded, sample: int) -> str | None:
    """The format of an image that Pillow decodes to its end; None where it does not, either."""
    content = (
        split.read(sample).tobytes()
        if isinstance(split, Shards)
        else Path(split.paths[sample]).read_bytes()
    )
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(content)) as image:
            warnings.simplefilter("ignore")
            image.load()
            return (image.format or "image").replace("WEBP", "WebP")
    except Exception:  # whatever a damaged file makes of its decoder
        return None


def _check_readable(split: Encoded, sample: int) -> None:
    """Raises OSError where an image is empty or cannot be read."""
    if isinstance(split, Shards):
        return
    with open(split.paths[sample], "rb") as file:
        if not file.read(1):
            raise OSError(0, "the file is empty")
