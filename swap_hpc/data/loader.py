"""Batches through DALI, on the CPU or a GPU by the same code."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, types
from nvidia.dali.pipeline import Pipeline, pipeline_def
from torch import Tensor

from swap_hpc.data.decode import explain_decode_error, path_bytes
from swap_hpc.data.sampling import DRAWS, Picks
from swap_hpc.data.splits import Arrays, Dataset, Files
from swap_hpc.devices import Device
from swap_hpc.recipe import Augment

Feed = Iterator[tuple[Any, ...]]  # per batch: what DALI's graph takes in, arrays whose first dimension is the batch's


def batches(
    dataset: Dataset, split: Arrays | Files, picks: Iterator[Picks], augment: Augment | None, batch_size: int, device: Device
) -> Iterator[tuple[Tensor, Tensor]]:
    """What `picks` names, one batch after the other: (images (n, C, H, W) float32, labels (n,) int64), on the device.

    Images are normalised by the data set's mean and deviation, and lie in memory as channels_last. `augment` None: the
    whole image; of files, the centre. `batch_size` is the largest n. Raises RunError for a file that cannot be decoded.
    """
    ahead: deque[np.ndarray] = deque()  # the samples that DALI was asked for and has not returned yet

    def noted() -> Iterator[Picks]:
        for pick in picks:
            ahead.append(pick.indices)
            yield pick

    if isinstance(split, Arrays):
        graph = _array_graph(dataset, split, noted(), augment, device)
    else:
        graph = _file_graph(dataset, split, noted(), augment, device)
    pipeline = _pipeline(graph, batch_size, device)
    labels = torch.from_numpy(split.labels).to(device.torch)
    # on a GPU, the stream that waits for DALI's output, and that DALI waits for before it uses the memory again
    stream = torch.cuda.current_stream(device.torch) if device.torch.type == "cuda" else None
    while True:
        try:
            (output,) = pipeline.run(stream)
        except StopIteration:
            return
        except RuntimeError as error:
            if isinstance(split, Files):
                explain_decode_error([split.paths[i] for indices in ahead for i in indices], error)
            raise
        images = torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
        yield images, labels[_on_device(ahead.popleft(), device)]


def _on_device(indices: np.ndarray, device: Device) -> Tensor:
    """(n,) int64, copied to a GPU without making the host wait for it."""
    tensor = torch.from_numpy(indices)
    return tensor.pin_memory().to(device.torch, non_blocking=True) if device.torch.type == "cuda" else tensor


def _pipeline(graph: Callable[[], Any], batch_size: int, device: Device) -> Pipeline:
    index = device.torch.index if device.torch.type == "cuda" else None
    # everything random is drawn by sampling.py; the seed only keeps DALI from choosing one
    return pipeline_def(graph)(batch_size=batch_size, num_threads=device.threads, device_id=index, seed=0, prefetch_queue_depth=2)


def _array_graph(dataset: Dataset, split: Arrays, picks: Iterator[Picks], augment: Augment | None, device: Device) -> Callable[[], Any]:
    """Crop, flip, normalise and cut out images that lie in memory: the host's, or on a GPU the GPU's."""
    augment = augment or Augment()
    pad, cutout = augment.pad, augment.cutout
    height, width = dataset.image_size
    on_gpu = device.torch.type == "cuda"
    images: Any = split.on_gpu(pad, device.torch) if on_gpu else split.padded(pad)

    def feed() -> Feed:
        for pick in picks:
            u = _draws(pick)
            place = np.floor(u[:, :2] * (2 * pad + 1)) / max(1, 2 * pad)  # of the crop, from 0 to 1, in whole pixels
            where = _on_device(pick.indices, device) if on_gpu else pick.indices
            corner = [_column(np.floor(u[:, 3:5] * [width - cutout + 1, height - cutout + 1]))] if cutout else []
            yield images[where], _column(place[:, 0]), _column(place[:, 1]), _mirror(u, augment), *corner

    def graph() -> Any:
        first, rest = itertools.tee(feed())
        image = fn.external_source((row[0] for row in first), device="gpu" if on_gpu else "cpu", batch=True)
        x, y, mirror, *corner = fn.external_source((row[1:] for row in rest), num_outputs=4 if cutout else 3, batch=True)
        image = _normalised(image, dataset, crop=(height, width), crop_pos_x=x, crop_pos_y=y, mirror=mirror)
        return fn.erase(image, anchor=corner[0], shape=(cutout, cutout), axis_names="WH", fill_value=0.0) if cutout else image

    return graph


def _file_graph(dataset: Dataset, split: Files, picks: Iterator[Picks], augment: Augment | None, device: Device) -> Callable[[], Any]:
    """Read and decode files; random resized crop and flip for training, resize and centre crop for evaluation.

    Source of the crop: Szegedy et al., "Going deeper with convolutions", 2014. A crop that would not fit is cut to the
    image's edge, where torchvision draws again.
    """
    height, width = dataset.image_size
    decode_on = "mixed" if device.torch.type == "cuda" else "cpu"
    area, ratio = (augment or Augment()).crop_area, (augment or Augment()).crop_ratio

    def feed() -> Feed:
        for pick in picks:
            u = _draws(pick)
            share = area[0] + u[:, 3] * (area[1] - area[0])
            aspect = np.exp(np.log(ratio[0]) + u[:, 4] * np.log(ratio[1] / ratio[0]))
            yield (
                [path_bytes(split.paths[i]) for i in pick.indices],
                _column(share),
                _column(aspect),
                _mirror(u, augment),
                u[:, 1::-1].copy(),
            )

    def training() -> Any:
        path, share, aspect, mirror, place = fn.external_source(feed(), num_outputs=5, batch=True)
        encoded = fn.io.file.read(path)
        shape = fn.cast(fn.peek_image_shape(encoded), dtype=types.FLOAT)
        aspect = aspect * shape[0] / shape[1]
        size = fn.stack(
            math.min(1.0, math.sqrt(share / aspect)), math.min(1.0, math.sqrt(share * aspect))
        )  # of the crop; the image is 1 x 1
        image = fn.decoders.image_slice(
            encoded, rel_start=place * (1.0 - size), rel_shape=size, axis_names="HW", device=decode_on, output_type=types.RGB
        )
        return _normalised(fn.resize(image, resize_x=width, resize_y=height), dataset, mirror=mirror)

    def evaluation() -> Any:
        path = fn.external_source((row[0] for row in feed()), batch=True)
        image = fn.decoders.image(fn.io.file.read(path), device=decode_on, output_type=types.RGB)
        image = fn.resize(image, resize_shorter=round(max(height, width) * 256 / 224))
        return _normalised(image, dataset, crop=(height, width))

    return training if augment else evaluation


def _normalised(image: Any, dataset: Dataset, **arguments: Any) -> Any:
    """(H, W, C) float32: seen as (C, H, W) it is channels_last without a copy."""
    return fn.crop_mirror_normalize(image, mean=dataset.mean, std=dataset.std, dtype=types.FLOAT, output_layout="HWC", **arguments)


def _draws(pick: Picks) -> np.ndarray:
    """(n, DRAWS) float32; zeros where nothing is augmented."""
    return pick.draws if pick.draws is not None else np.zeros((len(pick.indices), DRAWS), np.float32)


def _mirror(draws: np.ndarray, augment: Augment | None) -> np.ndarray:
    """(n,) int32: 1 for the images to mirror."""
    return ((draws[:, 2] >= 0.5) & bool(augment and augment.flip)).astype(np.int32)


def _column(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32)
