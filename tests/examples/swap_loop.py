"""The loop of plain_loop.py with SWAP: mpirun -n 4 python -m mpi4py swap_loop.py"""

from typing import Any

import torch
from mpi4py import MPI
from plain_loop import accuracy, batches, build, load, train
from torch import nn

from swap_hpc import Team, average_weights_, refresh_batchnorm_


def main(batches: Any = batches) -> nn.Module:
    samples, test = load()
    torch.manual_seed(0)
    model = build()
    train(model, batches(samples, size=200, epochs=10, seed=0), rate=0.2)
    world = Team(MPI.COMM_WORLD)
    train(model, batches(samples, size=40, epochs=3, seed=1 + world.rank), rate=0.05)
    average_weights_(model, world)
    mine = list(batches(samples, size=200, epochs=1, seed=1000))[world.rank :: world.size]
    refresh_batchnorm_(model, (images for images, _ in mine), world)
    print(f"accuracy {accuracy(model, test):.4f}")
    return model


if __name__ == "__main__":
    main()
