"""Data sets as users' own functions return them: in memory, and batches made by their code."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from nvidia.dali import fn

from swap_hpc.data import Batches, Dataset, Graph, Picks


def arrays(path: Path, **arguments: int) -> Dataset:
    """Return images in memory; how many depends on the path."""
    return tiny.dataset(**{"train": 48, "test": len(path.name), **arguments})


def batches(path: Path) -> Dataset:
    """Return a data set whose batches a generator makes; its size depends on the path."""

    def made(picks: Iterator[Picks], training: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for pick in picks:
            rows = torch.from_numpy(pick.indices)
            yield rows[:, None, None, None].float().expand(-1, 3, 8, 8), rows % 3

    return Dataset(Batches(48, made), Batches(len(path.name), made), ("a", "b", "c"))


def graph(path: Path) -> Dataset:
    """Return a data set whose batches a DALI graph makes; its size depends on the path."""

    def made(picks: Iterator[Picks], training: bool) -> tuple[Any, Any]:
        def feed() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for pick in picks:
                rows = np.zeros((len(pick.indices), 3, 8, 8), np.float32)
                yield rows + pick.indices[:, None, None, None], pick.indices % 3

        inputs, targets = fn.external_source(feed(), num_outputs=2, batch=True)
        return inputs, targets

    return Dataset(Graph(48, made), Graph(len(path.name), made), ("a", "b", "c"))
