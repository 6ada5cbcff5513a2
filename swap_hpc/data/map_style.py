"""A torch Dataset of the user's own, with random access, as the source of batches."""

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

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
    idle: list["DataLoader[Any]"] = field(default_factory=list)

    def __call__(self, picks: Iterator[Picks], training: bool) -> Iterator[Any]:
        loader = self.idle.pop() if self.idle else self._loader()
        assert isinstance(loader.batch_sampler, _PickedBatches)
        loader.batch_sampler.picks = picks
        try:
            with children_without_mpi():
                stream = iter(loader)
            yield from stream
        finally:  # also where the stream is not read to its end
            self.idle.append(loader)

    def _loader(self) -> "DataLoader[Any]":
        return DataLoader(
            _Seeded(self.dataset),
            batch_sampler=_PickedBatches(),
            collate_fn=self.collate,
            num_workers=self.workers,
            # a fork of a process that uses MPI is not safe
            multiprocessing_context="spawn" if self.workers else None,
            persistent_workers=self.workers > 0,
            worker_init_fn=_ignore_stops,
            generator=torch.Generator(),
        )


class _PickedBatches(Sampler[Any]):
    """What the loader asks the data set for: each pick's seed and samples."""

    picks: Iterator[Picks] = iter(())

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        for pick in self.picks:
            yield pick.seed, pick.indices.tolist()


@dataclass(frozen=True)
class _Seeded(Dataset[Any]):
    """The user's data set; what is random in its samples is drawn anew for each batch."""

    dataset: MapStyleDataset

    def __getitems__(self, batch: tuple[int, list[int]]) -> list[Any]:
        seed, samples = batch
        seed_all(seed)
        if several := getattr(self.dataset, "__getitems__", None):
            found: list[Any] = several(samples)
            return found
        return [self.dataset[sample] for sample in samples]


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
