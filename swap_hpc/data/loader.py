"""Batches of any split, on the CPU or a GPU."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from swap_hpc.data.crops import cropped, is_simple
from swap_hpc.data.custom_batches import custom_batches
from swap_hpc.data.dataset import Dataset
from swap_hpc.data.encoded import Encoded, explain_decode_error
from swap_hpc.data.finishing import resize_crops
from swap_hpc.data.graphs import (
    View,
    centre_crop_graph,
    memory_graph,
    random_crop_graph,
    resizes_later,
    whole_image_graph,
)
from swap_hpc.data.mixing import mixed, noted
from swap_hpc.data.pieces import Piece, pieces
from swap_hpc.data.pipeline import build_branching_pipeline, build_pipeline, run_pipeline
from swap_hpc.data.sampling import Picks
from swap_hpc.data.splits import Arrays, Batches, Split
from swap_hpc.data.transfer import as_tensor, to_device
from swap_hpc.errors import RunError
from swap_hpc.parallel.devices import Device
from swap_hpc.recipe.augment import Augment

# Images (n, C, H, W) float32 and labels (n,) int64; of a user's own data, inputs and targets:
# tensors (n, ...), or tuples, lists and dictionaries of them.
Batch = tuple[Any, Any]

# Pieces that DALI took in and has not returned yet: their samples, and whether their pick ends.
# Not the pieces themselves, which would keep the encoded images in memory.
InFlight = deque[tuple[np.ndarray, bool]]


def batches(
    dataset: Dataset,
    split: Split,
    picks: Iterator[Picks],
    view: View,
    batch_size: int,
    device: Device,
) -> Iterator[Batch]:
    """Make one batch for each of `picks`, in turn.

    Args:
        dataset: whose mean and deviation normalise the images.
        split: one of its splits.
        picks: the samples of each batch.
        view: augmentation and size of the images.
        batch_size: the largest number of samples in a pick.
        device: where the batches go.

    Returns:
        Images (n, C, H, W) float32 in the layout channels_last, and labels (n,) int64, or (n,
        classes) float32 where images are mixed; or what a user's function makes.

    Raises:
        RunError: an image cannot be read or decoded.
        UserError: a user's function makes other batches than asked for.
    """
    if isinstance(split, Batches):
        training = view.augment is not None
        return custom_batches(split, picks, training, batch_size, device)
    if view.augment is None or not view.augment.mixes:
        return _images(dataset, split, picks, view, batch_size, device)
    taken: deque[Picks] = deque()
    images = _images(dataset, split, noted(picks, taken), view, batch_size, device)
    return mixed(images, taken, view.augment, len(dataset.classes))


def _images(
    dataset: Dataset,
    split: Arrays | Encoded,
    picks: Iterator[Picks],
    view: View,
    batch_size: int,
    device: Device,
) -> Iterator[Batch]:
    if not isinstance(split, Arrays):
        return _streamed(dataset, split, picks, view, batch_size, device)
    if _crops_on_device(view.augment, device):
        return cropped(dataset, split, picks, view.augment, device.torch)
    return _from_memory(dataset, split, picks, view.augment or Augment(), batch_size, device)


def padding_on_host(augment: Augment, device: Device) -> int:
    """Return by how much training images in the host's memory are padded for `batches`."""
    return 0 if _crops_on_device(augment, device) else augment.pad


def _crops_on_device(augment: Augment | None, device: Device) -> bool:
    return device.torch.type == "cuda" and is_simple(augment)


def _from_memory(
    dataset: Dataset,
    split: Arrays,
    picks: Iterator[Picks],
    augment: Augment,
    batch_size: int,
    device: Device,
) -> Iterator[Batch]:
    in_flight: InFlight = deque()
    parts = _noted((Piece(pick, [], is_last=True) for pick in picks), in_flight)
    graph = memory_graph(dataset, split, parts, augment, device)
    finish = _finish(dataset, augment, dataset.image_size, device)
    outputs = run_pipeline(_pipeline(graph, augment, batch_size, device), device)
    yield from _joined(itertools.starmap(finish, outputs), in_flight, split.labels, device)


def _streamed(
    dataset: Dataset,
    split: Encoded,
    picks: Iterator[Picks],
    view: View,
    batch_size: int,
    device: Device,
) -> Iterator[Batch]:
    in_flight: InFlight = deque()
    cut = partial(pieces, split, picks, dataset.pixels_at_once, device.threads)
    finish: Callable[..., Tensor] = _unchanged
    if view.augment is None:
        shorter = view.shorter_side(dataset)
        parts = _noted(cut((shorter, shorter)), in_flight)
        graph = centre_crop_graph(dataset, split, parts, view, device)
    else:
        size = view.size_of(dataset)
        is_cropped = view.augment.crop_area is not None
        parts = _noted(cut() if is_cropped else cut(size), in_flight)
        make = random_crop_graph if is_cropped else whole_image_graph
        graph = make(dataset, split, parts, view.augment, size, device)
        finish = _finish(dataset, view.augment, size, device)
    pipeline = _pipeline(graph, view.augment, batch_size, device)
    outputs = _explained(run_pipeline(pipeline, device), split, in_flight)
    yield from _joined(itertools.starmap(finish, outputs), in_flight, split.labels, device)


def _pipeline(
    graph: Callable[[], Any], augment: Augment | None, batch_size: int, device: Device
) -> Pipeline:
    operates = augment is not None and augment.operates
    build = build_branching_pipeline if operates else build_pipeline
    return build(graph, batch_size, device)


def _finish(
    dataset: Dataset, augment: Augment, size: tuple[int, int], device: Device
) -> Callable[..., Tensor]:
    """Return what is done to the outputs of a graph for training."""
    if resizes_later(augment, device):
        return partial(resize_crops, size, dataset, augment)
    return _unchanged


def _noted(parts: Iterator[Piece], in_flight: InFlight) -> Iterator[Piece]:
    """Yield the pieces, noting each that DALI takes in."""
    for piece in parts:
        in_flight.append((piece.pick.indices, piece.is_last))
        yield piece


def _explained(
    outputs: Iterator[tuple[Any, ...]], split: Encoded, in_flight: InFlight
) -> Iterator[tuple[Any, ...]]:
    """Yield DALI's outputs; where it fails, name the image that cannot be decoded.

    Raises:
        RunError: an image cannot be read or decoded.
    """
    try:
        yield from outputs
    except RunError:  # it names what cannot be read
        raise
    except RuntimeError as error:
        samples = itertools.chain.from_iterable(indices for indices, _ in in_flight)
        explain_decode_error(split, samples, error)
        raise


def _joined(
    parts: Iterator[Tensor], in_flight: InFlight, labels: np.ndarray, device: Device
) -> Iterator[Batch]:
    """Join the pieces of each pick, (n, H, W, C), to one batch, and add its labels."""
    all_labels = as_tensor(labels).to(device.torch)
    images: list[Tensor] = []
    samples: list[np.ndarray] = []
    for part in parts:
        indices, is_last = in_flight.popleft()
        images.append(part)
        samples.append(indices)
        if is_last:
            batch = images[0] if len(images) == 1 else torch.cat(images)
            picked = to_device(np.concatenate(samples), device.torch)
            yield batch.permute(0, 3, 1, 2), all_labels[picked]
            images, samples = [], []


def _unchanged(images: Any) -> Tensor:
    return torch.from_dlpack(images.as_tensor())
