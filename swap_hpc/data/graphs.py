"""The DALI graphs of the package: from picked samples to normalised images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nvidia.dali import fn, math, types

from swap_hpc.data.dataset import Dataset
from swap_hpc.data.encoded import Encoded, centre_of, decode_whole, file_content
from swap_hpc.data.finishing import BOXES, Nodes, finished, normalised, numbers, reflected, taken_in
from swap_hpc.data.pieces import Piece
from swap_hpc.data.splits import Arrays
from swap_hpc.parallel.devices import Device
from swap_hpc.recipe.augment import Augment

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
    dataset: Dataset, split: Arrays, parts: Iterator[Piece], augment: Augment, device: Device
) -> Callable[[], Any]:
    """Make a graph that augments and normalises images in the host's memory.

    Where `resizes_later`, it returns what `resize_crops` takes in.
    """
    size = dataset.image_size
    images = split.padded(augment.pad)

    def feed() -> Feed:
        for part in parts:
            yield images[part.pick.indices], *numbers(part.pick, augment, size).values()

    def graph() -> Any:
        image, nodes = taken_in(feed(), "HWC", augment, size)
        whole = image.shape(dtype=types.FLOAT)[:2]
        if device.torch.type == "cuda":
            image = image.gpu()
        if not augment.crop_area:
            return finished(image, nodes, dataset, augment, size)
        start, shape = _window(nodes, whole)
        crop = fn.slice(image, start=start, shape=shape, axis_names="HW")
        return _resized(crop, nodes, dataset, augment, size, device)

    return graph


def resizes_later(augment: Augment, device: Device) -> bool:
    """Tell whether crops leave a graph before they are resized.

    On the CPU torch does it faster, but it cannot give them back to the graph's operations.
    """
    on_cpu = device.torch.type == "cpu"
    return on_cpu and augment.crop_area is not None and not augment.operates


def random_crop_graph(
    dataset: Dataset,
    split: Encoded,
    parts: Iterator[Piece],
    augment: Augment,
    size: tuple[int, int],
    device: Device,
) -> Callable[[], Any]:
    """Make a graph that decodes a random crop of each image, for training.

    It also resizes, mirrors and normalises the crop; or, where `resizes_later`, it returns what
    `resize_crops` takes in, which does the rest.
    """

    def feed() -> Feed:
        for part in parts:
            yield part.sources, *numbers(part.pick, augment, size).values()

    def graph() -> Any:
        source, nodes = taken_in(feed(), "", augment, size)
        file = file_content(split, source)
        start, shape = _window(nodes, fn.peek_image_shape(file, dtype=types.FLOAT)[:2])
        crop = fn.decoders.image_slice(
            file,
            start=start,
            shape=shape,
            axis_names="HW",
            device=_decoder(device),
            output_type=types.RGB,
            # colours on a GPU as the CPU's decoder makes them
            jpeg_fancy_upsampling=True,
        )
        return _resized(crop, nodes, dataset, augment, size, device)

    return graph


def _window(nodes: Nodes, image_size: Any) -> tuple[Any, Any]:
    """In a DALI graph, return the row and column, and the height and width, of random crops.

    A crop has a random area and aspect ratio, as in Szegedy et al., "Going deeper with
    convolutions", 2014. One that does not fit is cut to the image's edge, where torchvision draws
    again.
    """
    aspect = nodes["aspect"]
    area = nodes["share"] * image_size[0] * image_size[1]
    wanted = fn.stack(math.sqrt(area / aspect), math.sqrt(area * aspect))
    whole_pixels = math.max(1.0, math.floor(wanted + 0.5))
    shape = math.min(image_size, whole_pixels)
    # plus 1, so that every place in the image is equally likely
    start = math.floor(nodes["place"] * (image_size - shape + 1.0))
    return fn.cast(start, dtype=types.INT32), fn.cast(shape, dtype=types.INT32)


def _resized(
    crop: Any,
    nodes: Nodes,
    dataset: Dataset,
    augment: Augment,
    size: tuple[int, int],
    device: Device,
) -> Any:
    """In a DALI graph, resize crops and finish them, unless `resize_crops` does it later."""
    if resizes_later(augment, device):
        return crop, nodes["mirror"], *(nodes[name] for name in BOXES if name in nodes)
    height, width = size
    resized = fn.resize(crop, resize_x=width, resize_y=height)
    return finished(resized, nodes, dataset, augment, size)


def whole_image_graph(
    dataset: Dataset,
    split: Encoded,
    parts: Iterator[Piece],
    augment: Augment,
    size: tuple[int, int],
    device: Device,
) -> Callable[[], Any]:
    """Make a graph that decodes the largest centre square of each image, for training.

    The images are those that would be in memory if they fitted there.
    """

    def feed() -> Feed:
        for part in parts:
            yield part.sources, *numbers(part.pick, augment, size).values()

    def graph() -> Any:
        source, nodes = taken_in(feed(), "", augment, size)
        image = centre_of(decode_whole(file_content(split, source), _decoder(device)), size)
        if augment.pad:
            image = reflected(image, augment.pad, size)
        return finished(image, nodes, dataset, augment, size)

    return graph


def centre_crop_graph(
    dataset: Dataset, split: Encoded, parts: Iterator[Piece], view: View, device: Device
) -> Callable[[], Any]:
    """Make a graph that decodes, resizes and normalises images, cropped at the centre."""

    def graph() -> Any:
        source = fn.external_source((part.sources for part in parts), batch=True)
        image = decode_whole(file_content(split, source), _decoder(device))
        image = fn.resize(image, resize_shorter=view.shorter_side(dataset))
        return normalised(image, dataset, crop=view.size_of(dataset))

    return graph


def _decoder(device: Device) -> str:
    """Return where DALI decodes for a device."""
    return "mixed" if device.torch.type == "cuda" else "cpu"
