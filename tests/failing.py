"""Models that fail, for recipes to name.

Some raise on rank 1 in the middle of training, one of them as if its memory were full. Others fail
on all ranks: by the shape of their output, by `SystemExit`, or at a broken pipe.
"""

import errno

from mpi4py import MPI
from torch import OutOfMemoryError, Tensor, nn


class _Failing(nn.Module):
    """A linear layer that raises on rank 1 in its third step."""

    def __init__(self, classes: int):
        super().__init__()
        self.linear = nn.Linear(64, classes)
        self.steps = 0

    def forward(self, images: Tensor) -> Tensor:
        self.steps += 1
        if self.steps == 3 and MPI.COMM_WORLD.rank == 1:
            raise ArithmeticError("rank 1 cannot go on")
        return self.linear(images.flatten(1))


class _Full(_Failing):
    """The same, with the error that torch raises where a GPU's memory is full."""

    def forward(self, images: Tensor) -> Tensor:
        try:
            return super().forward(images)
        except ArithmeticError:
            raise OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ..."
            ) from None


class _Piping(nn.Module):
    """A model that meets a broken pipe, which is not the one of the command's own output."""

    def __init__(self, classes: int):
        super().__init__()
        self.linear = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        raise BrokenPipeError(errno.EPIPE, "a pipe of the model's own")


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


def writes_into_a_broken_pipe(classes: int, channels: int, width: int) -> nn.Module:
    return _Piping(classes)


def fills_the_memory_on_rank_1(classes: int, channels: int, width: int) -> nn.Module:
    return _Full(classes)
