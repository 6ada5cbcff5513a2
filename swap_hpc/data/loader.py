"""Batches through DALI, on the CPU or a GPU by the same code."""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, types
from nvidia.dali.pipeline import Pipeline, pipeline_def
from torch import Tensor
from torch.nn import functional as F

from swap_hpc.data.crops import crop_places, cropped, draws, mirrored, to_device
from swap_hpc.data.encoded import Encoded, encoded, explain_decode_error, whole_image
from swap_hpc.data.pieces import Piece, pieces
from swap_hpc.data.sampling import Picks
from swap_hpc.data.seeding import seed_all
from swap_hpc.data.splits import Arrays, Batches, Dataset, Graph, Split
from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.devices import Device
from swap_hpc.recipe.schema import Augment

ON_GPU = 2  # DLPack's number for CUDA's memory

Feed = Iterator[
    tuple[Any, ...]
]  # per batch: what DALI's graph takes in, arrays whose first dimension is the batch's


@dataclass(frozen=True)
class View:
    """How images are seen. Those in memory have one size; `size` and `crop` are of those that are read in every epoch."""

    augment: Augment | None  # None: evaluation, the whole image, or the centre
    size: tuple[int, int] | None = None  # (height, width) in pixels; None: the data set's
    crop: float = (
        0.875  # evaluation: side of the centre square as a share of the image's shorter side
    )


def batches(
    dataset: Dataset,
    split: Split,
    picks: Iterator[Picks],
    view: View,
    batch_size: int,
    device: Device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What `picks` names, one batch after the other: (images (n, C, H, W) float32, labels (n,) int64), on the device.

    Images are normalised by the data set's mean and deviation, and lie in memory as channels_last. `batch_size` is the largest
    n. Raises RunError for an image that cannot be read or decoded.
    """
    if isinstance(split, Batches):
        yield from _own_batches(split, picks, view.augment is not None, batch_size, device)
        return
    if isinstance(split, Arrays) and device.torch.type == "cuda":
        yield from cropped(dataset, split, picks, view.augment, device.torch)
        return
    ahead: deque[tuple[np.ndarray, bool]] = (
        deque()
    )  # samples that DALI was asked for and has not returned yet; whether a pick ends there

    def noted(parts: Iterator[Piece]) -> Iterator[Piece]:
        for piece in parts:
            ahead.append((piece.pick.indices, piece.ends))
            yield piece

    seen: Callable[..., Tensor] = _as_they_are
    if isinstance(split, Arrays):
        graph = _array_graph(
            dataset, split, noted(Piece(pick, [], ends=True) for pick in picks), view.augment
        )
    else:
        shorter = None if view.augment else _shorter(dataset, view)
        cut = pieces(
            split,
            picks,
            dataset.pixels_at_once,
            device.threads,
            (shorter, shorter) if shorter else None,
        )
        graph = _encoded_graph(dataset, split, noted(cut), view, device)
        if view.augment and device.torch.type == "cpu":
            seen = partial(_resized, view.size or dataset.image_size, dataset)
    pipeline = _pipeline(graph, batch_size, device)
    labels = torch.from_numpy(split.labels).to(device.torch)
    # on a GPU, the stream that waits for DALI's output, and that DALI waits for before it uses the memory again
    stream = torch.cuda.current_stream(device.torch) if device.torch.type == "cuda" else None
    images: list[Tensor] = []  # of the pick's pieces so far
    samples: list[np.ndarray] = []
    while True:
        try:
            outputs = pipeline.run(stream)
        except StopIteration:
            return
        except RunError:  # which names what cannot be read
            raise
        except RuntimeError as error:
            if not isinstance(split, Arrays):
                explain_decode_error(
                    split, itertools.chain(*(indices for indices, _ in ahead)), error
                )
            raise
        indices, ends = ahead.popleft()
        images.append(seen(*outputs))
        samples.append(indices)
        if ends:
            whole = images[0] if len(images) == 1 else torch.cat(images)
            yield (
                whole.permute(0, 3, 1, 2),
                labels[to_device(np.concatenate(samples), device.torch)],
            )
            images, samples = [], []


def _own_batches(
    split: Batches, picks: Iterator[Picks], training: bool, batch_size: int, device: Device
) -> Iterator[tuple[Tensor, Tensor]]:
    """A user's own batches, on the device. Raises UserError where they are not those that `picks` names."""
    asked: deque[int] = deque()  # the sizes of what was asked for and has not come yet
    thread = threading.get_ident()

    def noted() -> Iterator[Picks]:
        for pick in picks:
            asked.append(len(pick.indices))
            if (
                threading.get_ident() == thread
            ):  # a function's own thread must not seed the model's random numbers
                seed_all(pick.seed)  # for what the function draws, whenever it is asked
            yield pick

    wanted, name = noted(), f"the function that makes {'training' if training else 'test'} batches"
    if isinstance(split, Graph):
        found = _run_graph(split, split.picked(wanted), training, batch_size, device)
    else:
        found = split.read(wanted, training)
    for inputs, targets in found:
        size = asked.popleft() if asked else 0
        if len(targets) != size:
            raise UserError(
                f"{name} made one of {len(targets)} for {size} picked samples: it has to make one for each pick, in turn"
            )
        yield (
            inputs.to(device.torch, non_blocking=True),
            targets.to(device.torch, non_blocking=True),
        )
    if asked or next(wanted, None) is not None:
        raise UserError(f"{name} ended early: it has to make one for each pick, in turn")


def _run_graph(
    split: Graph, picks: Iterator[Picks], training: bool, batch_size: int, device: Device
) -> Iterator[tuple[Tensor, Tensor]]:
    pipeline = _pipeline(lambda: split.function(picks, training), batch_size, device)
    stream = torch.cuda.current_stream(device.torch) if device.torch.type == "cuda" else None
    while True:
        try:
            outputs = pipeline.run(stream)
        except StopIteration:
            return
        inputs, targets = (kept(output.as_tensor(), device) for output in outputs)
        yield inputs, targets


def kept(output: Any, device: Device) -> Tensor:
    """A graph's output, anything with a DLPack interface. What lies on the CPU and goes to a GPU is copied at once: DALI uses
    its memory again. (It may be pinned, which torch does not take by DLPack, and numpy does.)"""
    if device.torch.type == "cuda" and output.__dlpack_device__()[0] != ON_GPU:
        return to_device(np.array(np.from_dlpack(output)), device.torch)
    return torch.from_dlpack(output)


def _pipeline(graph: Callable[[], Any], batch_size: int, device: Device) -> Pipeline:
    index = device.torch.index if device.torch.type == "cuda" else None
    # everything random is drawn by sampling.py; the seed only keeps DALI from choosing one
    return pipeline_def(graph)(
        batch_size=batch_size,
        num_threads=device.threads,
        device_id=index,
        seed=0,
        prefetch_queue_depth=2,
    )


def _array_graph(
    dataset: Dataset, split: Arrays, parts: Iterator[Piece], augment: Augment | None
) -> Callable[[], Any]:
    """Crop, flip, normalise and cut out images that lie in the host's memory."""
    augment = augment or Augment()
    pad, cutout = augment.pad, augment.cutout
    height, width = dataset.image_size
    images = split.padded(pad)

    def feed() -> Feed:
        for part in parts:
            x, y, mirror, left, top = crop_places(part.pick, augment, (height, width))
            place = (
                _column(each) / np.float32(max(1, 2 * pad)) for each in (x, y)
            )  # of the crop, from 0 to 1, in whole pixels
            corner = [_column(np.stack([left, top], 1))] if cutout else []
            yield images[part.pick.indices], *place, mirror.astype(np.int32), *corner

    def graph() -> Any:
        image, x, y, mirror, *corner = fn.external_source(
            feed(), num_outputs=5 if cutout else 4, batch=True
        )
        image = _normalised(
            image, dataset, crop=(height, width), crop_pos_x=x, crop_pos_y=y, mirror=mirror
        )
        return (
            fn.erase(
                image, anchor=corner[0], shape=(cutout, cutout), axis_names="WH", fill_value=0.0
            )
            if cutout
            else image
        )

    return graph


def _encoded_graph(
    dataset: Dataset, split: Encoded, parts: Iterator[Piece], view: View, device: Device
) -> Callable[[], Any]:
    """Read and decode images; random resized crop and flip for training, resize and centre crop for evaluation.

    Source of the crop: Szegedy et al., "Going deeper with convolutions", 2014. A crop that would not fit is cut to the
    image's edge, where torchvision draws again. On the CPU the crop is left to `_resized`.
    """
    height, width = view.size or dataset.image_size
    augment = view.augment
    decode_on = "mixed" if device.torch.type == "cuda" else "cpu"
    areas, ratios = (augment or Augment()).crop_area, (augment or Augment()).crop_ratio

    def feed() -> Feed:
        for part in parts:
            u = draws(part.pick)
            share = areas[0] + u[:, 3] * (areas[1] - areas[0])
            aspect = np.exp(np.log(ratios[0]) + u[:, 4] * np.log(ratios[1] / ratios[0]))
            yield (
                part.sources,
                _column(share),
                _column(aspect),
                mirrored(u, augment),
                u[:, 1::-1].copy(),
            )

    def training() -> Any:
        source, share, aspect, mirror, place = fn.external_source(feed(), num_outputs=5, batch=True)
        file = encoded(split, source)
        shape = fn.peek_image_shape(file, dtype=types.FLOAT)[:2]
        area = share * shape[0] * shape[1]
        size = math.min(
            shape,
            math.max(
                1.0, math.floor(fn.stack(math.sqrt(area / aspect), math.sqrt(area * aspect)) + 0.5)
            ),
        )
        start = math.floor(place * (shape - size + 1.0))  # every place in the image is as likely
        image = fn.decoders.image_slice(
            file,
            start=fn.cast(start, dtype=types.INT32),
            shape=fn.cast(size, dtype=types.INT32),
            axis_names="HW",
            device=decode_on,
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,  # of colours, as the CPU's decoder does it
        )
        if decode_on == "cpu":
            return image, mirror
        return _normalised(
            fn.resize(image, resize_x=width, resize_y=height), dataset, mirror=mirror
        )

    def evaluation() -> Any:
        source = fn.external_source((row[0] for row in feed()), batch=True)
        image = whole_image(encoded(split, source), decode_on)
        image = fn.resize(image, resize_shorter=_shorter(dataset, view))
        return _normalised(image, dataset, crop=(height, width))

    return training if augment else evaluation


def _shorter(dataset: Dataset, view: View) -> int:
    """Pixels of an evaluated image's shorter side before its centre is cropped."""
    return round(max(view.size or dataset.image_size) / view.crop)


def _normalised(image: Any, dataset: Dataset, **arguments: Any) -> Any:
    """(H, W, C) float32: seen as (C, H, W) it is channels_last without a copy."""
    return fn.crop_mirror_normalize(
        image,
        mean=dataset.mean,
        std=dataset.std,
        dtype=types.FLOAT,
        output_layout="HWC",
        **arguments,
    )


def _as_they_are(images: Any) -> Tensor:
    return torch.from_dlpack(images.as_tensor())


def _resized(size: tuple[int, int], dataset: Dataset, crops: Any, mirrored: Any) -> Tensor:
    """On the CPU: crops (h, w, 3) uint8 of any sizes, resized, mirrored and normalised: (n, H, W, 3) float32.

    With torch's kernel for antialiased uint8, which takes a fifth of the time of DALI's.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # an image is too small to share, and DALI's threads have the cores
    images = torch.empty(len(crops), *size, 3)
    mean, deviation = (
        torch.tensor(channels).repeat(size[1]) for channels in (dataset.mean, dataset.std)
    )
    for crop, mirror, image in zip(crops, np.asarray(mirrored.as_tensor()), images, strict=True):
        whole = torch.from_numpy(np.asarray(crop))[None].permute(0, 3, 1, 2)
        resized = F.interpolate(whole, size=size, mode="bilinear", antialias=True)
        rows = image.view(
            size[0], -1
        )  # a whole row at a time: channels alone are too short for vector instructions
        rows.copy_(
            (resized.flip(3) if mirror else resized).permute(0, 2, 3, 1).view(rows.shape)
        ).sub_(mean).div_(deviation)
    torch.set_num_threads(threads)
    return images


def _column(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32)
