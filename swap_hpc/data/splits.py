"""What a data set is: images in memory, or files to read in every epoch, with labels."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import torch

from swap_hpc.data.sampling import Picks
from swap_hpc.errors import RunError, UserError


@dataclass(frozen=True, eq=False)
class Arrays:
    """A split in memory."""

    images: np.ndarray  # (N, H, W, C) uint8
    labels: np.ndarray  # (N,) int64; of a user's own data, targets (N, ...)
    files: str = ""  # of what they were decoded from, a hash: the last bits of decoded pixels may be a processor's own

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def contents(self) -> tuple[str, ...]:
        """What the ranks have to hold alike of it, briefly; here as in the other splits."""
        return (str(self.images.shape), self.files or _hash(self.images), _hash(self.labels))

    def take(self, which: np.ndarray) -> "Arrays":
        return replace(self, images=self.images[which], labels=self.labels[which])

    @lru_cache(maxsize=2)  # noqa: B019  (splits live as long as the run)
    def padded(self, pad: int) -> np.ndarray:
        """(N, H + 2 pad, W + 2 pad, C) uint8, padded by reflection: a random crop of it is then a matter of two positions."""
        return self._pad(pad)

    @lru_cache(maxsize=2)  # noqa: B019
    def on_device(self, pad: int, device: torch.device) -> torch.Tensor:
        """`padded(pad)`, resident on a device."""
        return torch.from_numpy(self._pad(pad)).to(device)

    def _pad(self, pad: int) -> np.ndarray:
        return (
            np.pad(self.images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
            if pad
            else self.images
        )


@dataclass(frozen=True, eq=False)
class Files:
    """A split whose images are files, to be read and decoded in every epoch."""

    paths: tuple[str, ...]
    labels: np.ndarray  # (N,) int64
    notes: tuple[str, ...] = ()  # what was left out of the folder they were found in, a line each

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def contents(self) -> tuple[str, ...]:
        above = (
            os.path.commonprefix(self.paths).rfind("/") + 1
        )  # nodes may have the folder at places of their own
        names = os.fsencode("\n".join(path[above:] for path in self.paths))
        return (_hash(np.frombuffer(names, np.uint8)), _hash(self.labels))

    @cached_property
    def sizes(self) -> np.ndarray:
        """(N, 2) int32: height and width of each image, as far as `pieces.Headers` has looked; 0: not yet."""
        return np.zeros((len(self), 2), np.int32)

    def take(self, which: np.ndarray) -> "Files":
        return Files(tuple(self.paths[i] for i in which), self.labels[which])

    def name(self, sample: int) -> str:
        """Of the file, as an error says it."""
        return self.paths[sample]

    def sources(self, samples: Iterable[int]) -> list[np.ndarray]:
        """Paths as DALI's file reader takes them, (bytes,) uint8."""
        return [np.frombuffer(os.fsencode(self.paths[i]), dtype=np.uint8) for i in samples]


@dataclass(frozen=True, eq=False)
class Shards:
    """A split whose images lie in tar files, to be read and decoded in every epoch."""

    tars: tuple[str, ...]
    tar: np.ndarray  # (N,) int32: which of them holds a sample
    offset: np.ndarray  # (N,) int64: bytes from its beginning
    size: np.ndarray  # (N,) int64: bytes
    labels: np.ndarray  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def contents(self) -> tuple[str, ...]:
        return tuple(_hash(array) for array in (self.tar, self.offset, self.size, self.labels))

    @cached_property
    def sizes(self) -> np.ndarray:
        """(N, 2) int32: as of `Files`."""
        return np.zeros((len(self), 2), np.int32)

    def take(self, which: np.ndarray) -> "Shards":
        return Shards(
            self.tars, self.tar[which], self.offset[which], self.size[which], self.labels[which]
        )

    def name(self, sample: int) -> str:
        return f"at byte {self.offset[sample]} of {self.tars[self.tar[sample]]}"

    def sources(self, samples: Iterable[int]) -> list[np.ndarray]:
        """The encoded images, (bytes,) uint8."""
        return [self.read(i) for i in samples]

    def read(self, sample: int) -> np.ndarray:
        """An encoded image, (bytes,) uint8. Raises RunError."""
        name = self.tars[self.tar[sample]]
        try:
            found = os.pread(_opened(name), int(self.size[sample]), int(self.offset[sample]))
        except OSError as error:
            raise RunError(f"cannot read {name}: {error.strerror}") from None
        if len(found) < self.size[sample]:
            raise RunError(f"{name} is shorter than its index says: pack it again")
        return np.frombuffer(found, dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class Batches:
    """A split whose batches a function of the user's makes, from whatever it likes.

    `function(picks, training)` yields, for each of `picks` in turn, one pair: inputs and targets, tensors whose first dimension
    is n. It makes them as they are asked for (a generator), since `picks` of training are those of all epochs;
    a `Picks` holds the samples' numbers `indices` (n,) int64 and, in training, random `draws` (n, 5) float32 in [0, 1).
    What follows from these alone is the same on any number of ranks, and when a run goes on where it stopped.
    """

    samples: int
    function: Callable[[Iterator[Picks], bool], Iterable[tuple[torch.Tensor, torch.Tensor]]]
    which: np.ndarray | None = None  # (n,) int64: only these samples

    def __len__(self) -> int:
        return self.samples if self.which is None else len(self.which)

    @property
    def contents(self) -> tuple[str, ...]:
        return ()

    def take(self, which: np.ndarray) -> "Batches":
        return replace(self, which=which if self.which is None else self.which[which])

    def read(
        self, picks: Iterator[Picks], training: bool
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(self.function(self.picked(picks), training))

    def picked(self, picks: Iterator[Picks]) -> Iterator[Picks]:
        """The same, by the samples' own numbers."""
        return (
            picks
            if self.which is None
            else (replace(pick, indices=self.which[pick.indices]) for pick in picks)
        )


@dataclass(frozen=True, eq=False)
class Graph(Batches):
    """A split that a DALI graph of the user's reads: `function(picks, training)` is called where a pipeline is built.

    It feeds `picks` to `fn.external_source(..., batch=True)` and returns two DataNodes: inputs and targets.
    """

    function: Callable[[Iterator[Picks], bool], tuple[Any, Any]]


Split: TypeAlias = Arrays | Files | Shards | Batches


def _hash(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).reshape(-1).data).hexdigest()


def _opened(name: str) -> int:
    """A tar file's descriptor, open to the end of the process; several threads may ask for it."""
    with _OPENING:
        return _opened_once(name)


_OPENING = Lock()


@cache
def _opened_once(name: str) -> int:
    return os.open(name, os.O_RDONLY)


@dataclass(frozen=True, eq=False)
class Dataset:
    """What is trained and tested on. A user's own holds `Arrays` (then `image_size`, `mean` and `std` say how they are read; see
    `with_statistics`), or `Batches` or a `Graph`, which need none of them."""

    train: Split
    test: Split
    classes: tuple[str, ...]  # their number, and that of the channels, is what a model is built for
    image_size: tuple[int, int] = (
        0,
        0,
    )  # (height, width) in pixels, as the model sees them; of images that the package reads
    channels: int = 3
    mean: tuple[float, ...] = ()  # per channel, of pixels in [0, 255]
    std: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()  # what a person should know of how it was found: lines to print
    pixels_at_once: int = (
        2**25
    )  # of streamed images: how many are decoded at once, but always one image


def with_validation(dataset: Dataset, samples: int) -> Dataset:
    """That many training samples, always the same ones of a data set, set aside as its test split; 0: as it is. Raises UserError."""
    if not samples:
        return dataset
    if samples >= len(dataset.train):
        raise UserError(
            f"data.validation = {samples} leaves none of {len(dataset.train)} training samples: set it lower"
        )
    order = np.random.Generator(np.random.Philox(0x76616C)).permutation(len(dataset.train))
    aside, rest = np.sort(order[:samples]), np.sort(order[samples:])
    return replace(dataset, train=dataset.train.take(rest), test=dataset.train.take(aside))


def with_statistics(train: Arrays, test: Arrays, classes: tuple[str, ...]) -> Dataset:
    """A data set in memory, to be normalised by its training images' mean and deviation per channel."""
    _, height, width, channels = train.images.shape
    values = np.arange(256.0)
    mean, std = [], []
    for c in range(channels):
        parts = (
            train.images[start : start + 1024, ..., c] for start in range(0, len(train), 1024)
        )  # bincount makes 8 bytes of each
        counts = np.sum([np.bincount(part.ravel(), minlength=256) for part in parts], axis=0)
        mean.append(float(counts @ values / counts.sum()))
        std.append(float(np.sqrt(counts @ (values - mean[-1]) ** 2 / counts.sum())) or 1.0)
    return Dataset(train, test, classes, (height, width), channels, tuple(mean), tuple(std))
