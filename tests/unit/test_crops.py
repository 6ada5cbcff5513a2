"""torch's crops equal DALI's to the bit: a GPU trains on the same pixels as a CPU."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from swap_hpc.data import crops, loader, pipeline
from swap_hpc.data.crops import cropped
from swap_hpc.data.dataset import Dataset, with_statistics
from swap_hpc.data.sampling import Key, Picks, evaluation_picks, training_picks
from swap_hpc.data.splits import Arrays
from swap_hpc.parallel.devices import Device
from swap_hpc.recipe.augment import Augment
from swap_hpc.recipe.phase import Phase

CPU = Device(torch.device("cpu"), 1)
SAMPLES, BATCH = 301, 50


def dataset(height: int, width: int, channels: int) -> Dataset:
    generator = np.random.default_rng(3)

    def split(samples: int) -> Arrays:
        images = generator.integers(0, 256, (samples, height, width, channels), dtype=np.uint8)
        return Arrays(images, generator.integers(0, 10, samples))

    return with_statistics(split(SAMPLES), split(9), tuple("0123456789"))


def arrays(data: Dataset) -> Arrays:
    assert isinstance(data.train, Arrays)
    return data.train


def picks(epochs: int = 2) -> Iterator[Picks]:
    return training_picks(Key(7, Phase.LARGE_BATCH), SAMPLES, BATCH, 0, 1, range(epochs))


# Images (height, width, channels), and what is done to them
CASES = [
    ((8, 8, 3), Augment(pad=1, flip=True, cutout=2)),
    ((32, 32, 3), Augment(pad=4, flip=True, cutout=8)),
    ((9, 7, 1), Augment(pad=3, flip=True)),
    ((8, 6, 4), Augment(cutout=3)),
    ((6, 8, 3), Augment(pad=2)),
    ((5, 5, 3), Augment()),
    ((8, 7, 3), None),
]


@pytest.mark.parametrize("steps", [1, 4, 16])
@pytest.mark.parametrize(("size", "augment"), CASES)
def test_pixels_and_labels_are_dalis(
    size: tuple[int, int, int], augment: Augment | None, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many steps are made at once; the last time may be fewer."""
    monkeypatch.setattr(crops, "STEPS_AT_ONCE", steps)
    data = dataset(*size)
    by_dali = loader.batches(data, data.train, picks(), loader.View(augment), BATCH, CPU)
    by_torch = cropped(data, arrays(data), picks(), augment, CPU.torch)
    count = 0
    for (images, labels), (expected, expected_labels) in zip(by_torch, by_dali, strict=True):
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, expected) and torch.equal(labels, expected_labels)
        count += 1
    assert count == 2 * (SAMPLES // BATCH)


def test_evaluation_sees_whole_images_once_the_last_batch_smaller() -> None:
    data = dataset(8, 8, 3)
    batches = list(evaluation_picks(SAMPLES, 64, 0, 1))
    by_dali = loader.batches(data, data.train, iter(batches), loader.View(None), 64, CPU)
    by_torch = list(cropped(data, arrays(data), iter(batches), None, CPU.torch))
    assert [len(labels) for _, labels in by_torch] == [64, 64, 64, 64, 45]
    for (images, labels), (expected, expected_labels) in zip(by_torch, by_dali, strict=True):
        assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


def test_no_more_steps_are_made_at_once_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_per_batch = BATCH * 8 * 8 * 3 * 4
    monkeypatch.setattr(crops, "BYTES_AT_ONCE", 2 * bytes_per_batch + 1)
    data, asked = dataset(8, 8, 3), []

    def noted() -> Iterator[Picks]:
        for pick in picks():
            asked.append(pick)
            yield pick

    stream = cropped(data, arrays(data), noted(), Augment(), CPU.torch)
    asked_by_then = [len(asked) for _ in stream]
    assert asked_by_then == [2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12]
    monkeypatch.setattr(crops, "BYTES_AT_ONCE", 1)  # at least one step is made all the same
    assert len(list(cropped(data, arrays(data), picks(), Augment(), CPU.torch))) == 12


def test_targets_of_any_shape_come_along() -> None:
    data = dataset(8, 8, 3)
    train = arrays(data)
    split = Arrays(train.images, np.stack([train.labels, train.labels + 1], 1))
    batches = cropped(data, split, picks(), Augment(), CPU.torch)
    for (_, targets), pick in zip(batches, picks(), strict=True):
        assert torch.equal(targets, torch.from_numpy(split.labels[pick.indices]))


def test_a_graphs_output_on_the_cpu_is_copied_before_dali_uses_its_memory_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The transfer to the GPU still runs while DALI fills its buffers again.

    No GPU is needed: the copy stays on the CPU.
    """
    monkeypatch.setattr(pipeline, "to_device", lambda values, device: torch.from_numpy(values))
    output = torch.arange(4.0)
    kept = pipeline.to_torch(output, Device(torch.device("cuda", 0), 1))
    output.zero_()
    assert kept.tolist() == [0, 1, 2, 3]
    assert (
        pipeline.to_torch(output, CPU).data_ptr() == output.data_ptr()
    )  # on the CPU nothing is copied
