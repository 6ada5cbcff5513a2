"""The DALI graphs of the package: from picked samples to normalised images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, types
from torch import Tensor
from torch.nn import functional as F

from swap_hpc.data.crops import crop_places, draws, mirrored
from swap_hpc.data.dataset import Dataset
from swap_hpc.data.encoded import Encoded, decode_whole, file_content
from swap_hpc.data.pieces import Piece
from swap_hpc.data.splits import Arrays
from swap_hpc.parallel.devices import Device
from swap_hpc.recipe.inputs import Augment

# What a graph takes in for one batch: arrays, or lists of them, with an entry for each sample.
Feed = Iterator[tuple[Any, ...]]


@dataclass(frozen=True)
class View:
    """How images are seen.

    `size` and `crop` matter where images are read in every epoch: images in memory have one size.
    """

    augment: Augment | None  # None: evaluation, which sees the whole image or its centre
    size: tuple[int, int] | None = None  # (height, width) in pixels; None: the data set's
    # evaluation: side of the centre square as a share of the image's shorter side
    crop: float = 0.875

    def size_of(self, dataset: Dataset) -> tuple[int, int]:
        """Return (height, width) of what the model sees, in pixels."""
        return self.size or dataset.image_size

    def shorter_side(self, dataset: Dataset) -> int:
        """Return the pixels of an evaluated image's shorter side, before its centre is cropped."""
        return round(max(self.size_of(dataset)) / self.crop)


def memory_graph(
    dataset: Dataset, split: Arrays, parts: Iterator[Piece], augment: Augment | None
) -> Callable[[], Any]:
    """Make a graph that crops, mirrors, normalises and cuts out images in the host's memory."""
    settings = augment or Augment()
    pad, cutout = settings.pad, settings.cutout
    height, width = dataset.image_size
    images = split.padded(pad)

    def feed() -> Feed:
        for part in parts:
            x, y, mirror, left, top = crop_places(part.pick, settings, (height, width))
            # DALI wants the crop's place as a share of the room that it has
            room = np.float32(max(1, 2 * pad))
            batch = [
                images[part.pick.indices],
                _float32(x) / room,
                _float32(y) / room,
                mirror.astype(np.int32),
            ]
            if cutout:
                batch.append(_float32(np.stack([left, top], 1)))
            yield tuple(batch)

    def graph() -> Any:
        inputs = fn.external_source(feed(), num_outputs=5 if cutout else 4, batch=True)
        image, x, y, mirror, *corner = inputs
        image = _normalised(
            image, dataset, crop=(height, width), crop_pos_x=x, crop_pos_y=y, mirror=mirror
        )
        if not cutout:
            return image
        return fn.erase(
            image, anchor=corner[0], shape=(cutout, cutout), axis_names="WH", fill_value=0.0
        )

    return graph


def random_crop_graph(
    dataset: Dataset,
    split: Encoded,
    parts: Iterator[Piece],
    augment: Augment,
    size: tuple[int, int],
    device: Device,
) -> Callable[[], Any]:
    """Make a graph that decodes a random crop of each image, for training.

    On a GPU it also resizes, mirrors and normalises the crop. On the CPU it returns the crop and
    whether to mirror it; `resize_crops` does the rest.

    The crop has a random area and aspect ratio, as in Szegedy et al., "Going deeper with
    convolutions", 2014. One that does not fit is cut to the image's edge, where torchvision draws
    again.
    """
    height, width = size
    on_gpu = device.torch.type == "cuda"

    def feed() -> Feed:
        low, high = augment.crop_area
        narrow, wide = augment.crop_ratio
        for part in parts:
            u = draws(part.pick)
            share = low + u[:, 3] * (high - low)
            aspect = np.exp(np.log(narrow) + u[:, 4] * np.log(wide / narrow))
            place = u[:, 1::-1].copy()  # (y, x)
            yield part.sources, _float32(share), _float32(aspect), mirrored(u, augment), place

    def graph() -> Any:
        source, share, aspect, mirror, place = fn.external_source(feed(), num_outputs=5, batch=True)
        file = file_content(split, source)
        image_size = fn.peek_image_shape(file, dtype=types.FLOAT)[:2]
        area = share * image_size[0] * image_size[1]
        wanted = fn.stack(math.sqrt(area / aspect), math.sqrt(area * aspect))
        whole_pixels = math.max(1.0, math.floor(wanted + 0.5))
        crop_size = math.min(image_size, whole_pixels)
        # plus 1, so that every place in the image is equally likely
        start = math.floor(place * (image_size - crop_size + 1.0))
        crop = fn.decoders.image_slice(
            file,
            start=fn.cast(start, dtype=types.INT32),
            shape=fn.cast(crop_size, dtype=types.INT32),
            axis_names="HW",
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            # colours on a GPU as the CPU's decoder makes them
            jpeg_fancy_upsampling=True,
        )
        if not on_gpu:
            return crop, mirror
        resized = fn.resize(crop, resize_x=width, resize_y=height)
        return _normalised(resized, dataset, mirror=mirror)

    return graph


def centre_crop_graph(
    dataset: Dataset, split: Encoded, parts: Iterator[Piece], view: View, device: Device
) -> Callable[[], Any]:
    """Make a graph that decodes, resizes and normalises images, cropped at the centre."""
    decode_on = "mixed" if device.torch.type == "cuda" else "cpu"

    def graph() -> Any:
        source = fn.external_source((part.sources for part in parts), batch=True)
        image = decode_whole(file_content(split, source), decode_on)
        image = fn.resize(image, resize_shorter=view.shorter_side(dataset))
        return _normalised(image, dataset, crop=view.size_of(dataset))

    return graph


def resize_crops(size: tuple[int, int], dataset: Dataset, crops: Any, mirror: Any) -> Tensor:
    """Resize, mirror and normalise crops on the CPU.

    torch's kernel for antialiased uint8 takes a fifth of the time of DALI's.

    Args:
        size: (height, width) in pixels to resize to.
        dataset: whose mean and deviation normalise the images.
        crops: a batch of DALI's, each (h, w, 3) uint8 of any size.
        mirror: a batch of DALI's, (n,) int32, 1 for each crop to mirror.

    Returns:
        (n, H, W, 3) float32.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # an image is too small to share, and DALI's threads have the cores
    height, width = size
    images = torch.empty(len(crops), height, width, 3)
    # A row of pixels at a time: channels alone are too short for vector instructions.
    mean = torch.tensor(dataset.mean).repeat(width)
    deviation = torch.tensor(dataset.std).repeat(width)
    for crop, mirrors, image in zip(crops, np.asarray(mirror.as_tensor()), images, strict=True):
        whole = torch.from_numpy(np.asarray(crop))[None].permute(0, 3, 1, 2)
        resized = F.interpolate(whole, size=size, mode="bilinear", antialias=True)
        if mirrors:
            resized = resized.flip(3)
        rows = image.view(height, -1)
        rows.copy_(resized.permute(0, 2, 3, 1).view(rows.shape)).sub_(mean).div_(deviation)
    torch.set_num_threads(threads)
    return images


def _normalised(image: Any, dataset: Dataset, **arguments: Any) -> Any:
    """Normalise images in a graph, (H, W, C) float32.

    Seen as (C, H, W) that is the layout channels_last, without a copy.
    """
    return fn.crop_mirror_normalize(
        image,
        mean=dataset.mean,
        std=dataset.std,
        dtype=types.FLOAT,
        output_layout="HWC",
        **arguments,
    )


def _float32(values: np.ndarray) -> np.ndarray:
    """Return values as DALI takes them in: float32, C-contiguous."""
    return np.ascontiguousarray(values, dtype=np.float32)
