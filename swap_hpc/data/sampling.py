"""Which samples a step holds and how each is augmented: pure functions, of numbers only.

Everything random is drawn by a counter-based generator keyed by (seed, phase, group, epoch) and indexed by the sample.
So the samples of a step do not depend on how many ranks share them, and resuming needs no generator state.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from swap_hpc.recipe.phase import Part, Phase

DRAWS = 5  # random numbers per sample: crop x, crop y, mirror, and two for cutout's place or the crop's area and ratio


EVALUATION: Final = "evaluation"  # no phase, but what is random in it has a key of its own

# The second of the numbers that key the random draws; never renumber them.
NUMBERS: Final = {Phase.LARGE_BATCH: 1, Phase.REFINE: 2, Phase.AVERAGE: 3, EVALUATION: 4}


@dataclass(frozen=True)
class Key:
    """What keys the random draws of a phase: phase 3 draws the samples that batch norm sees."""

    seed: int
    phase: Phase | Literal["evaluation"]
    group: int = 0

    @classmethod
    def of(cls, seed: int, part: Part) -> "Key":
        """Return the key of a part of the run."""
        return cls(seed, part.phase, part.group or 0)

    @property
    def _numbers(self) -> tuple[int, int, int]:
        return self.seed, NUMBERS[self.phase], self.group

    def generator(self, *counters: int) -> np.random.Generator:
        return np.random.Generator(
            np.random.Philox(np.random.SeedSequence((*self._numbers, *counters)))
        )

    def torch_seed(self, step: int, rank: int) -> int:
        """What the global generators are seeded with at a step, so that dropout is resumable too; `step` since the phase began."""
        return int(
            np.random.SeedSequence((*self._numbers, step, rank, 0x70726368)).generate_state(
                1, np.uint64
            )[0]
        )


@dataclass(frozen=True)
class Picks:
    """One rank's samples of one step."""

    indices: np.ndarray  # (n,) int64, into the training or test split
    draws: (
        np.ndarray | None
    )  # (n, DRAWS) float32 in [0, 1): the samples' augmentation; None: no augmentation

    @property
    def seed(self) -> int:
        """What the global generators are seeded with for code that makes this batch: a hash of its samples and draws."""
        told = self.indices.tobytes() + (b"" if self.draws is None else self.draws.tobytes())
        return int.from_bytes(hashlib.sha256(told).digest()[:8], "little")


@dataclass(frozen=True)
class Epoch:
    """All samples of one epoch."""

    order: np.ndarray  # (N,) int64
    draws: np.ndarray  # (N, DRAWS) float32 in [0, 1), by sample

    @classmethod
    def drawn(cls, key: Key, epoch: int, samples: int) -> "Epoch":
        """`epoch` counts from 0 since the phase began, over all its cycles."""
        generator = key.generator(epoch)
        return cls(
            generator.permutation(samples), generator.random((samples, DRAWS), dtype=np.float32)
        )

    def picks(self, first: int, end: int) -> Picks:
        """The samples from one place in the order to another."""
        indices = self.order[first:end]
        return Picks(indices, self.draws[indices])


def epoch_picks(key: Key, epoch: int, samples: int) -> Picks:
    """All samples of one epoch, in its order. `epoch` counts from 0 since the phase began, over all its cycles."""
    return Epoch.drawn(key, epoch, samples).picks(0, samples)


def training_picks(
    key: Key,
    samples: int,
    batch_size: int,
    rank: int,
    size: int,
    epochs: range,
    first_step: int = 0,
) -> Iterator[Picks]:
    """A rank's share of each step of `epochs`: contiguous, and together with the other ranks' the step's whole batch.

    An epoch's last partial batch is dropped. `first_step` skips that many steps of the first epoch. Each epoch is drawn by a
    thread while the one before is trained on.
    """
    share = batch_size // size
    with ThreadPoolExecutor(1, "picks") as ahead:
        drawing = ahead.submit(Epoch.drawn, key, epochs.start, samples)
        for epoch in epochs:
            whole = drawing.result()
            if epoch + 1 in epochs:
                drawing = ahead.submit(Epoch.drawn, key, epoch + 1, samples)
            for step in range(first_step if epoch == epochs.start else 0, samples // batch_size):
                first = step * batch_size + rank * share
                yield whole.picks(first, first + share)


def evaluation_picks(samples: int, batch_size: int, rank: int, size: int) -> Iterator[Picks]:
    """Each sample once: batches cut independently of the number of ranks (the last one may be smaller), dealt out to them."""
    for start in range(rank * batch_size, samples, size * batch_size):
        yield Picks(np.arange(start, min(start + batch_size, samples)), None)


def batchnorm_picks(
    seed: int, samples: int, use: int, batch_size: int, rank: int, size: int
) -> Iterator[Picks]:
    """`use // batch_size` whole batches of augmented training samples, cut independently of the number of ranks, dealt out."""
    whole = Epoch.drawn(Key(seed, Phase.AVERAGE), 0, samples)
    for batch in range(rank, use // batch_size, size):
        yield whole.picks(batch * batch_size, (batch + 1) * batch_size)
