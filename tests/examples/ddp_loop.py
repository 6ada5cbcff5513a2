"""The loop of plain_loop.py, with DistributedDataParallel and SWAP.

Start it with: torchrun --nproc-per-node 2 ddp_loop.py
or with:       mpirun -n 2 python -m mpi4py ddp_loop.py
"""

import os

import torch
from plain_loop import Samples, batches, build, load, train
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from swap_hpc import (
    Team,
    average_weights_,
    distributed_environment,
    evaluate,
    refresh_batchnorm_,
    weights_sha256,
)


def connect() -> Team:
    """Connect all ranks, and return their team."""
    if "RANK" not in os.environ:  # mpirun sets no variables of torch's
        os.environ.update(distributed_environment(Team.world()))
    distributed.init_process_group("gloo")
    return Team.world()


def shared_batches(samples: Samples, size: int, epochs: int) -> list[Samples]:
    """Return this rank's share of the batches of several epochs, in an order that all ranks know.

    Args:
        samples: the same on all ranks.
        size: of a batch, all ranks together.
        epochs: how many.
    """
    images = TensorDataset(*samples)
    share = size // distributed.get_world_size()
    sampler: DistributedSampler[Samples] = DistributedSampler(images, seed=0, drop_last=True)
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)  # otherwise each epoch has the same order
        found += list(DataLoader(images, share, sampler=sampler, drop_last=True))
    return found


def main() -> nn.Module:
    world = connect()
    samples, (test_images, test_labels) = load()

    # Phase 1: all ranks train one model, with the first rank's weights at the beginning.
    torch.manual_seed(0)
    model = build()
    wrapped = DistributedDataParallel(model)
    train(wrapped, iter(shared_batches(samples, size=200, epochs=10)), rate=0.2)

    # Phase 2: each rank goes on alone, with the plain module. Through the wrapper the ranks would
    # still average their gradients (and copy the first rank's buffers): there would be one model,
    # and nothing to average.
    del wrapped
    train(model, batches(samples, size=40, epochs=3, seed=1 + world.rank), rate=0.05)

    # Phase 3.
    average_weights_(model, world)
    mine = list(batches(samples, size=200, epochs=1, seed=1000))[world.rank :: world.size]
    refresh_batchnorm_(model, (images for images, _ in mine), world)
    share = slice(world.rank, None, world.size)
    found = evaluate(model, [(test_images[share], test_labels[share])], world)
    if world.rank == 0:
        print(f"accuracy {found.accuracy:.4f}, weights_sha256 {weights_sha256(model)}")
    distributed.destroy_process_group()
    return model


if __name__ == "__main__":
    main()
