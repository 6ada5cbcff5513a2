"""A torch Dataset of the user's own, with random access, as the source of batches."""

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from swap_hpc.data.sampling import Picks
from swap_hpc.data.seeding import seed_all
from swap_hpc.data.splits import MapStyleDataset
from swap_hpc.parallel.launcher import children_without_mpi

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class MapStyle:
    """Makes the batches of `Batches.of`, through torch's DataLoader.

    A loader is used again by the next stream of batches after its own has ended, because its worker
    processes take seconds to start. Streams that are open at the same time have one each.
    """

    dataset: MapStyleDataset
    collate: Collate | None
    workers: int
    evaluated: MapStyleDataset | None = None  # the same samples as they are evaluated
    idle: list["DataLoader[Any]"] = field(default_factory=list)

    @property
    def has_evaluated(self) -> bool:
        """Whether the samples have a data set of their own where a model is evaluated."""
        return self.evaluated is not None

    @property
    def has_no_transforms(self) -> bool:
        """Whether the samples are tensors, which are read as they are."""
        return isinstance(self.dataset, TensorDataset)

    def __call__(self, picks: Iterator[Picks], training: bool) -> Iterator[Any]:
        loader = self.idle.pop() if self.idle else self._loader()
        assert isinstance(loader.batch_sampler, _PickedBatches)
        loader.batch_sampler.picks = picks
        loader.batch_sampler.evaluates = not training
        try:
            with children_without_mpi():
                stream = iter(loader)
            yield from stream
        finally:  # also where the stream is not read to its end
            self.idle.append(loader)

    def _loader(self) -> "DataLoader[Any]":
        return DataLoader(
            _Seeded(self.dataset, self.evaluated),
            batch_sampler=_PickedBatches(),
            collate_fn=self.collate,
            num_workers=self.workers,
            # a fork of a process that uses MPI is not safe
            multiprocessing_context="spawn" if self.workers else None,
            persistent_workers=self.workers > 0,
            worker_init_fn=_ignore_stops,
            generator=torch.Generator(),
        )


@dataclass(frozen=True)
class _Batch:
    """What the loader asks the data set for."""

    samples: list[int]
    seeds: list[int]  # one for each sample
    seed: int  # of the whole batch
    evaluates: bool


class _PickedBatches(Sampler[Any]):
    """The batches of a stream, one for each pick."""

    picks: Iterator[Picks] = iter(())
    evaluates: bool = False

    def __iter__(self) -> Iterator[_Batch]:
        for pick in self.picks:
            yield _Batch(pick.indices.tolist(), pick.sample_seeds, pick.seed, self.evaluates)


@dataclass(frozen=True)
class _Seeded(Dataset[Any]):
    """The user's data set; what is random in a sample is drawn anew each time it is read."""

    dataset: MapStyleDataset
    evaluated: MapStyleDataset | None

    def __getitems__(self, batch: _Batch) -> list[Any]:
        with_others = batch.evaluates and self.evaluated is not None
        dataset: Any = self.evaluated if with_others else self.dataset
        if several := getattr(dataset, "__getitems__", None):
            seed_all(batch.seed)
            found: list[Any] = several(batch.samples)
            return found
        return [_read(dataset, *each) for each in zip(batch.samples, batch.seeds, strict=True)]


def _read(dataset: MapStyleDataset, sample: int, seed: int) -> Any:
    seed_all(seed)
    return dataset[sample]


def _ignore_stops(worker: int) -> None:
    """Leave a stop to the rank, which still needs its workers until it has saved."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """End worker processes at exit, where multiprocessing would wait for them after a SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler reports a killed worker
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
