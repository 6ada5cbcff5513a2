"""Which samples a step holds and how each is augmented: pure functions of numbers.

A counter-based generator, keyed by (seed, phase, group, epoch) and indexed by the sample, draws all
random numbers. So the samples of a step do not depend on how many ranks share them, and resuming
needs no generator state.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from swap_hpc.data.workers import workers
from swap_hpc.recipe.phase import Part, Phase

# Random numbers per sample: the crop's x and y, mirroring, and two more. The last two choose the
# area and aspect ratio of a crop that is resized; otherwise they place the cutout.
DRAWS = 5

# Further random numbers come from streams of their own, drawn only where a recipe needs them. So
# what one part of the augmentation draws does not depend on the others. Never renumber them.
STREAMS: Final = {"cutout": 1, "mix": 2, "erasing": 3, "policy": 4, "jitter": 5}

EVALUATION: Final = "evaluation"  # no phase, but what is random in it has a key of its own

# The second of the numbers that key the random draws; never renumber them.
NUMBERS: Final = {Phase.LARGE_BATCH: 1, Phase.REFINE: 2, Phase.AVERAGE: 3, EVALUATION: 4}
EVERY_RANK = 2**32 - 1  # no rank has this number


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
        """Return the seed of the global generators at a step, which makes dropout resumable.

        Args:
            step: counted from 0 since the phase began.
            rank: the rank in the phase's team; EVERY_RANK for a draw that all ranks make alike.
        """
        words = (*self._numbers, step, rank, 0x70726368)
        return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class Picks:
    """One rank's samples of one step.

    Attributes:
        indices: (n,) int64, the samples' numbers in their split, from 0.
        draws: (n, 5) float32 in [0, 1), five random numbers for the augmentation of each sample;
            None where nothing is augmented.
        more: for each stream that the augmentation needs, (n, its numbers) float32 in [0, 1).
    """

    indices: np.ndarray
    draws: np.ndarray | None
    more: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """A 64-bit hash of the samples and draws, to seed the code that makes this batch."""
        content = self.indices.tobytes()
        if self.draws is not None:
            content += self.draws.tobytes()
        return _hashed(content)

    @property
    def sample_seeds(self) -> list[int]:
        """64-bit hashes of each sample's number and draws, whichever other samples are picked."""
        numbers = [index.tobytes() for index in self.indices]
        if self.draws is None:
            return [_hashed(number) for number in numbers]
        pairs = zip(numbers, self.draws, strict=True)
        return [_hashed(number + draws.tobytes()) for number, draws in pairs]


def _hashed(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


@dataclass(frozen=True)
class Epoch:
    """All samples of one epoch."""

    order: np.ndarray  # (N,) int64
    draws: np.ndarray  # (N, DRAWS) float32 in [0, 1); row i belongs to sample i, not to order[i]
    more: Mapping[str, np.ndarray]  # stream -> (N, its numbers) float32 in [0, 1), likewise

    @classmethod
    def drawn(
        cls, key: Key, epoch: int, samples: int, streams: Mapping[str, int] | None = None
    ) -> "Epoch":
        """Draw an epoch.

        Args:
            key: the key of the random draws.
            epoch: counts from 0 since the phase began, over all its cycles.
            samples: samples of the split.
            streams: how many random numbers per sample to draw from each of `STREAMS`.
        """
        generator = key.generator(epoch)
        order = generator.permutation(samples)
        draws = generator.random((samples, DRAWS), dtype=np.float32)
        more = {
            name: key.generator(epoch, STREAMS[name]).random((samples, count), dtype=np.float32)
            for name, count in (streams or {}).items()
        }
        return cls(order, draws, more)

    def picks(self, first: int, end: int) -> Picks:
        """Return the samples at the places `first` to `end` (exclusive) of the order."""
        indices = self.order[first:end]
        more = {name: draws[indices] for name, draws in self.more.items()}
        return Picks(indices, self.draws[indices], more)


def epoch_picks(
    key: Key, epoch: int, samples: int, streams: Mapping[str, int] | None = None
) -> Picks:
    """Return all samples of one epoch in its order; the arguments are those of `Epoch.drawn`."""
    return Epoch.drawn(key, epoch, samples, streams).picks(0, samples)


def training_picks(
    key: Key,
    samples: int,
    batch_size: int,
    rank: int,
    size: int,
    epochs: range,
    first_step: int = 0,
    streams: Mapping[str, int] | None = None,
) -> Iterator[Picks]:
    """Yield a rank's share of each step of `epochs`.

    A share is contiguous; the shares of all ranks in turn are the step's batch. The last partial
    batch of an epoch is dropped.

    Args:
        key: the key of the random draws.
        samples: samples of the split.
        batch_size: samples per step, all ranks together; a multiple of `size`.
        rank: this rank's place in the team.
        size: ranks of the team.
        epochs: consecutive epochs, counted from 0 since the phase began.
        first_step: steps of the first epoch to skip.
        streams: how many random numbers per sample to draw from each of `STREAMS`.
    """
    share = batch_size // size
    steps = samples // batch_size
    # a thread draws the next epoch while this one is trained on
    with workers(1, "picks") as pool:
        drawing = pool.submit(Epoch.drawn, key, epochs.start, samples, streams)
        for epoch in epochs:
            drawn = drawing.result()
            if epoch + 1 in epochs:
                drawing = pool.submit(Epoch.drawn, key, epoch + 1, samples, streams)
            begin = first_step if epoch == epochs.start else 0
            for step in range(begin, steps):
                first = step * batch_size + rank * share
                yield drawn.picks(first, first + share)


def evaluation_picks(samples: int, batch_size: int, rank: int, size: int) -> Iterator[Picks]:
    """Yield a rank's batches of an evaluation, which sees each sample once.

    Batches are cut independently of the number of ranks, and dealt out to them in turn. The last
    one may be smaller.
    """
    for start in range(rank * batch_size, samples, size * batch_size):
        end = min(start + batch_size, samples)
        yield Picks(np.arange(start, end), None)


def batchnorm_picks(
    seed: int,
    samples: int,
    use: int,
    batch_size: int,
    rank: int,
    size: int,
    streams: Mapping[str, int] | None = None,
) -> Iterator[Picks]:
    """Yield a rank's batches of augmented training samples to re-estimate batch norm on.

    `use // batch_size` whole batches are cut independently of the number of ranks, and dealt out
    to them in turn.
    """
    drawn = Epoch.drawn(Key(seed, Phase.AVERAGE), 0, samples, streams)
    for batch in range(rank, use // batch_size, size):
        yield drawn.picks(batch * batch_size, (batch + 1) * batch_size)
