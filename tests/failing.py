"""Models that fail: on one rank in the middle of training, also for want of memory; everywhere by their output; by leaving; at a pipe."""

import errno
import time

from mpi4py import MPI
from torch import OutOfMemoryError, Tensor, nn


class _Failing(nn.Module):
    def __init__(self, classes: int):
        super().__init__()
        self.linear = nn.Linear(64, classes)
        self.steps = 0

    def forward(self, images: Tensor) -> Tensor:
        self.steps += 1
        if self.steps == 3 and MPI.COMM_WORLD.rank == 1:
            print("raising at", time.time(), flush=True)
            raise ArithmeticError("rank 1 cannot go on")
        return self.linear(images.flatten(1))


class _Full(_Failing):
    def forward(self, images: Tensor) -> Tensor:
        try:
            return super().forward(images)
        except ArithmeticError:
            raise OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ..."
            ) from None


def raises_on_rank_1(classes: int, channels: int, width: int) -> nn.Module:
    return _Failing(classes)


def has_two_classes(classes: int, channels: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))


def leaves(classes: int, channels: int, width: int) -> nn.Module:
    raise SystemExit(0)


def refuses_on_rank_1(classes: int, channels: int, width: int) -> nn.Module:
    if MPI.COMM_WORLD.rank == 1:
        raise ValueError("not on this rank")
    return nn.Linear(64, classes)


class _Piping(nn.Module):
    def __init__(self, classes: int):
        super().__init__()
        self.linear = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        raise BrokenPipeError(errno.EPIPE, "a pipe of the model's own")


def writes_into_a_broken_pipe(classes: int, channels: int, width: int) -> nn.Module:
    return _Piping(classes)


def fills_the_memory_on_rank_1(classes: int, channels: int, width: int) -> nn.Module:
    return _Full(classes)
