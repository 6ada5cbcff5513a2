"""Encoded images in DALI's graphs, and the name of the one that cannot be decoded."""

import io
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from PIL import Image

from swap_hpc.data.splits import Files, Shards
from swap_hpc.errors import RunError

Encoded: TypeAlias = Files | Shards


def file_content(split: Encoded, source: Any) -> Any:
    """In a DALI graph, return the encoded images for what `split.sources` gives."""
    return fn.io.file.read(source) if isinstance(split, Files) else source


def decode_whole(file: Any, device: str = "cpu") -> Any:
    """In a DALI graph, decode whole images to (H, W, 3) uint8, red, green and blue.

    The size is read first, though the decoder would find it. DALI's decoder (2.4.0) sometimes ends
    the process where a header in its batch is damaged, because it returns while its threads still
    run; `peek_image_shape` raises an error.
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


def centre_of(image: Any, size: tuple[int, int]) -> Any:
    """In a DALI graph, resize images until one side fits, and crop the centre of the other."""
    height, width = map(float, size)
    image = fn.resize(image, resize_y=height, resize_x=width, mode="not_smaller")
    return fn.crop(image, crop=size)


def explain_decode_error(split: Encoded, samples: Iterable[int], error: Exception) -> None:
    """Name the first of `samples` that cannot be decoded; return if all of them can be.

    DALI's own error does not tell which image of a batch it is about.

    Args:
        split: what the samples belong to.
        samples: those that DALI was asked for when it failed.
        error: DALI's error, the cause of what is raised.

    Raises:
        RunError: an image cannot be read or decoded.
    """
    tried: list[int] = []

    def one_by_one() -> Iterator[list[np.ndarray]]:
        for sample in samples:
            tried.append(sample)
            _check_readable(split, sample)
            yield split.sources([sample])

    def graph() -> Any:
        return decode_whole(file_content(split, fn.external_source(one_by_one(), batch=True)))

    # nothing runs ahead: the sample tried last is the one that fails
    pipeline = pipeline_def(graph)(
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
        _raise_unreadable(split.name(tried[-1]), reason, error)
    except RunError:  # it names a shard that cannot be read
        raise
    except RuntimeError:
        name = split.name(tried[-1])
        if kind := _format_by_pillow(split, tried[-1]):
            raise RunError(
                f"DALI does not decode this valid {kind} file ({name}): "
                "convert it, for example to PNG"
            ) from error
        _raise_unreadable(name, "not an image that DALI decodes, or damaged", error)


def _raise_unreadable(name: str, reason: str, cause: Exception) -> NoReturn:
    raise RunError(
        f"cannot decode the image {name} ({reason}): replace or remove the file"
    ) from cause


def _format_by_pillow(split: Encoded, sample: int) -> str | None:
    """Return the format of an image that Pillow decodes to its end, or None if it cannot."""
    if isinstance(split, Shards):
        content = split.read(sample).tobytes()
    else:
        content = Path(split.paths[sample]).read_bytes()
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(content)) as image:
            warnings.simplefilter("ignore")
            image.load()
            return (image.format or "image").replace("WEBP", "WebP")
    except Exception:  # a damaged file may make its decoder raise anything
        return None


def _check_readable(split: Encoded, sample: int) -> None:
    """Raise OSError if a file is empty or cannot be read; `Shards.read` checks its own."""
    if isinstance(split, Shards):
        return
    with open(split.paths[sample], "rb") as file:
        if not file.read(1):
            raise OSError(0, "the file is empty")
