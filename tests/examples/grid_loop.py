"""Four copies of the model, refined on 1, 2 or 4 ranks: the result is the same.

Start it with: torchrun --nproc-per-node 4 grid_loop.py
or with:       mpirun -n 4 python -m mpi4py grid_loop.py
"""

from copy import deepcopy

import torch
from ddp_loop import connect
from plain_loop import accuracy, batches, build, load, train
from torch import nn

from swap_hpc import WeightSum, average_weights_, grid, refresh_batchnorm_, weights_sha256


def main() -> nn.Module:
    world = connect()
    samples, test = load()
    torch.manual_seed(0)
    model = build()
    train(model, batches(samples, size=200, epochs=10, seed=0), rate=0.2)
    with grid(world, groups=4) as ranks:
        total = WeightSum()
        for number in ranks.groups:
            copy = deepcopy(model)
            train(copy, batches(samples, size=40, epochs=3, seed=1 + number), rate=0.05)
            total.add_(copy)
        average_weights_(model, ranks.peers, total)
    mine = list(batches(samples, size=200, epochs=1, seed=1000))[world.rank :: world.size]
    refresh_batchnorm_(model, (images for images, _ in mine), world)
    if world.rank == 0:
        print(f"accuracy {accuracy(model, test):.4f}, weights_sha256 {weights_sha256(model)}")
    return model


if __name__ == "__main__":
    main()
