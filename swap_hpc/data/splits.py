"""The kinds of splits: images in memory, image files, tar files, and batches made by a user's code.

All have a length, `contents` (what ranks compare) and `take` (some of the samples).
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from swap_hpc.data.open_tars import descriptor
from swap_hpc.data.padding import in_parts, inside, reflected
from swap_hpc.data.sampling import Picks
from swap_hpc.errors import RunError, UserError


@dataclass(frozen=True, eq=False)
class Arrays:
    """A split of images that lie in memory.

    Attributes:
        images: (N, H, W, C) uint8.
        labels: (N,) class numbers from 0; for a loss of the user's own, targets (N, ...).
            The loss gets integers as int64 and other numbers as float32.
        files: a hash of the files that the images were decoded from, or empty. Ranks and runs
            compare it instead of the pixels: their last bits may differ between processors.
        names: of the files, one for each image, or empty.
    """

    images: np.ndarray
    labels: np.ndarray
    files: str = ""
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def in_frame(
        cls,
        frame: np.ndarray,
        pad: int,
        labels: np.ndarray,
        files: str = "",
        names: tuple[str, ...] = (),
    ) -> "Arrays":
        """Return the split of the images inside a frame, which is kept as what `padded` returns.

        Args:
            frame: (N, H + 2 pad, W + 2 pad, C) uint8, the images padded by reflection.
            pad: the width of the frame on each side, in pixels.
            labels: as the attribute.
            files: as the attribute.
            names: as the attribute.
        """
        split = cls(inside(frame, pad), labels, files, names)
        split._padded[pad] = frame
        return split

    @cached_property
    def contents(self) -> tuple[str, ...]:
        """Shapes and hashes of what all ranks must hold alike."""
        return (str(self.images.shape), self.files or _hash(self.images), _hash(self.labels))

    def with_contents(self, contents: tuple[str, ...]) -> "Arrays":
        """Return this split, whose contents are known: they will not be hashed."""
        vars(self)["contents"] = contents  # where cached_property keeps them
        return self

    def take(self, which: np.ndarray) -> "Arrays":
        """Return the split of the samples `which`, (n,) int64."""
        names = tuple(self.names[i] for i in which) if self.names else ()
        return replace(self, images=self.images[which], labels=self.labels[which], names=names)

    def name(self, sample: int) -> str:
        """Return the path of an image, or "" where it does not come from a file."""
        return self.names[sample] if self.names else ""

    @cached_property
    def _padded(self) -> dict[int, np.ndarray]:
        """The padded images that there are, by the padding."""
        return {0: self.images}

    def padded(self, pad: int) -> np.ndarray:
        """Return the images padded by reflection, (N, H + 2 pad, W + 2 pad, C) uint8.

        A random crop of a padded image is then a matter of two positions.
        """
        if pad not in self._padded:
            self._padded[pad] = reflected(self.images, pad)
        return self._padded[pad]

    # B019: the cache keeps its splits alive, which live as long as the run anyway. Three entries
    # are the training, the validation and the test split.
    @lru_cache(maxsize=3)  # noqa: B019
    def on_device(self, pad: int, device: torch.device) -> torch.Tensor:
        """Return `padded(pad)` as a tensor on a device, and keep no copy in the host's memory."""
        number, height, width, channels = self.images.shape
        shape = (number, height + 2 * pad, width + 2 * pad, channels)
        found = torch.empty(shape, dtype=torch.uint8, device=device)
        for some in in_parts(range(number)):
            found[some] = torch.from_numpy(reflected(self.images[some], pad))
        return found


@dataclass(frozen=True, eq=False)
class Files:
    """A split whose images are files, read and decoded in every epoch.

    Attributes:
        paths: (N,) of the files, in any format that DALI decodes.
        labels: (N,) class numbers from 0; for a loss of the user's own, targets (N, ...).
        notes: what was left out of the folder that holds the files, in lines.
    """

    paths: tuple[str, ...]
    labels: np.ndarray
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def contents(self) -> tuple[str, ...]:
        """Hashes of the paths below the folder that they share, and of the labels."""
        # only below that folder: each node may have it in another place
        above = os.path.commonprefix(self.paths).rfind("/") + 1
        names = os.fsencode("\n".join(path[above:] for path in self.paths))
        return (_hash(np.frombuffer(names, np.uint8)), _hash(self.labels))

    @cached_property
    def sizes(self) -> np.ndarray:
        """(N, 2) int32: height and width of each image; 0 until `pieces.Headers` fills it in."""
        return np.zeros((len(self), 2), np.int32)

    def take(self, which: np.ndarray) -> "Files":
        """Return the split of the samples `which`, (n,) int64, without notes."""
        return Files(tuple(self.paths[i] for i in which), self.labels[which])

    def name(self, sample: int) -> str:
        """Return the name of an image for an error message."""
        return self.paths[sample]

    def sources(self, samples: Iterable[int]) -> list[np.ndarray]:
        """Return the paths as DALI's file reader takes them, each (bytes,) uint8."""
        return [np.frombuffer(os.fsencode(self.paths[i]), dtype=np.uint8) for i in samples]


@dataclass(frozen=True, eq=False)
class Shards:
    """A split whose images lie in tar files, read and decoded in every epoch."""

    tars: tuple[str, ...]  # paths
    tar: np.ndarray  # (N,) int32: the number of a sample's tar file in `tars`
    offset: np.ndarray  # (N,) int64: bytes from the beginning of the tar file to the image
    size: np.ndarray  # (N,) int64: bytes of the encoded image
    labels: np.ndarray  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def contents(self) -> tuple[str, ...]:
        """Hashes of the samples' places and labels."""
        return tuple(_hash(array) for array in (self.tar, self.offset, self.size, self.labels))

    @cached_property
    def sizes(self) -> np.ndarray:
        """(N, 2) int32: height and width of each image; 0 until `pieces.Headers` fills it in."""
        return np.zeros((len(self), 2), np.int32)

    def take(self, which: np.ndarray) -> "Shards":
        """Return the split of the samples `which`, (n,) int64."""
        return Shards(
            self.tars, self.tar[which], self.offset[which], self.size[which], self.labels[which]
        )

    def name(self, sample: int) -> str:
        """Return the place of an image for an error message."""
        return f"at byte {self.offset[sample]} of {self.tars[self.tar[sample]]}"

    def sources(self, samples: Iterable[int]) -> list[np.ndarray]:
        """Return the encoded images, each (bytes,) uint8.

        Raises:
            RunError: a tar file cannot be read, or is too short.
        """
        return [self.read(i) for i in samples]

    def read(self, sample: int) -> np.ndarray:
        """Return an encoded image, (bytes,) uint8.

        Raises:
            RunError: the tar file cannot be read, or is too short.
        """
        name = self.tars[self.tar[sample]]
        size = int(self.size[sample])
        try:
            content = os.pread(descriptor(name), size, int(self.offset[sample]))
        except OSError as error:
            raise RunError(f"cannot read {name}: {error.strerror}") from None
        if len(content) < size:
            raise RunError(f"{name} is shorter than its index says: pack it again")
        return np.frombuffer(content, dtype=np.uint8)


class MapStyleDataset(Protocol):
    """A data set with random access, as torch's `Dataset` is where it has a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True, eq=False)
class Batches:
    """A split whose batches a function of the user's makes, from anything.

    The function is called as `function(picks, training)`. It yields one pair `(inputs, targets)`
    for each of `picks`, in their order: two tensors whose first dimension is the number n of
    samples in that pick. Either may also be a tuple, list or dictionary of such tensors, in any
    nesting: the model is called as `model(inputs)`, with whatever it is, and the loss and the
    metric as `loss(outputs, targets)`. The function should be a generator, which makes a batch when
    it is asked for one: in training, `picks` covers all epochs.

    A pick is one rank's share of a step. What the function makes of each sample's number and draws
    alone is the same on any number of ranks, and when a run resumes. The global generators of
    torch, `numpy.random` and `random` are seeded anew with each pick, in the thread that calls the
    function: what it draws from them is the same when a run resumes on as many ranks, and another
    on another number.

    A run fails with `RunError` where the function raises an error, and with `UserError` where it
    ends early or a batch has another size than its pick.

    Attributes:
        samples: number of samples of the split, N.
        function: takes an iterator of `Picks` and a bool, true in training and false in
            evaluation; returns an iterable of pairs (inputs, targets).
        which: (n,) int64, the numbers of the samples that `take` has left; None: all.
    """

    samples: int
    function: Callable[[Iterator[Picks], bool], Iterable[tuple[Any, Any]]]
    which: np.ndarray | None = None

    @staticmethod
    def of(
        dataset: "MapStyleDataset",
        collate: Callable[[list[Any]], tuple[Any, Any]] | None = None,
        workers: int = 0,
        evaluated: "MapStyleDataset | None" = None,
    ) -> "Batches":
        """Return the split of a torch Dataset, read by torch's DataLoader.

        Args:
            dataset: has a length; `dataset[i]` is the pair (input, target) of a sample. The global
                generators of torch, `numpy.random` and `random` are seeded anew before each
                sample is read: what it draws from them is the same on any number of ranks, with
                any number of workers, and when a run resumes. Where a data set has
                `__getitems__`, they are seeded before each batch, a rank's share of a step.
            collate: makes a batch, a pair (inputs, targets), of a list of pairs; None: torch's
                `default_collate`, which stacks them. What it draws depends on how many ranks share
                a step.
            workers: processes that read samples, per rank and stream of batches; 0: the rank
                itself. They are started anew ("spawn"), so that the data set must be picklable.
            evaluated: the same samples in the same order, without random transforms. They are
                read where a model is evaluated on samples of this split: those that
                `data.validation` sets aside, and by `swap-hpc evaluate --split train`. None:
                `dataset` is read there, too.

        Raises:
            UserError: `evaluated` has another length than `dataset`.
        """
        from swap_hpc.data.map_style import MapStyle

        if evaluated is not None and len(evaluated) != len(dataset):
            raise UserError(
                f"Batches.of got {len(dataset)} samples, and {len(evaluated)} in evaluated: "
                "give both the same samples in the same order"
            )
        return Batches(len(dataset), MapStyle(dataset, collate, workers, evaluated))

    def __len__(self) -> int:
        return self.samples if self.which is None else len(self.which)

    @property
    def contents(self) -> tuple[str, ...]:
        """Nothing: what a function makes cannot be compared."""
        return ()

    def take(self, which: np.ndarray) -> "Batches":
        """Return the split of the samples `which`, (n,) int64."""
        return replace(self, which=which if self.which is None else self.which[which])

    def read(self, picks: Iterator[Picks], training: bool) -> Iterator[tuple[Any, Any]]:
        """Call the function for picks that count this split's samples."""
        return iter(self.function(self.picked(picks), training))

    def picked(self, picks: Iterator[Picks]) -> Iterator[Picks]:
        """Translate picks from this split's numbers to those of the whole, before any `take`."""
        if self.which is None:
            return picks
        which = self.which
        return (replace(pick, indices=which[pick.indices]) for pick in picks)


@dataclass(frozen=True, eq=False)
class Graph(Batches):
    """A split that a DALI graph of the user's reads.

    The function is called as `function(picks, training)` where a DALI pipeline is built. It feeds
    `picks` to `fn.external_source(..., batch=True)` and returns two DataNodes: inputs and targets,
    one batch for each of `picks`.

    Attributes:
        samples: number of samples of the split, N.
        function: takes an iterator of `Picks` and a bool, true in training and false in
            evaluation; returns a pair of DataNodes.
        which: (n,) int64, the numbers of the samples that `take` has left; None: all.
    """

    function: Callable[[Iterator[Picks], bool], tuple[Any, Any]]


Split: TypeAlias = Arrays | Files | Shards | Batches


def _hash(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).reshape(-1).data).hexdigest()
