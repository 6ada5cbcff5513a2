"""A check that the ranks which train one model still hold the same weights, to the bit."""

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from swap_hpc.average.kinds import averaged_tensors
from swap_hpc.average.state import state_of
from swap_hpc.errors import RunError
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import once, real, tensor_bytes


def weights_sha256(model: nn.Module) -> str:
    """A hash of the state dict: sorted names, dtypes, shapes, C-contiguous little-endian bytes."""
    return hashed(state_of(model)).hexdigest()


def hashed(tensors: Mapping[str, Tensor]) -> "hashlib._Hash":
    """SHA-256 of tensors: their sorted names, dtypes, shapes, C-contiguous little-endian bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(
            f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode()
        )
        digest.update(tensor_bytes(tensor).data)
    return digest


def check_equal(model: nn.Module, team: Team) -> str:
    """The hash of `model`. Raises RunError where it differs between the ranks of `team`."""
    digest = weights_sha256(model)
    if len(set(team.allgather(digest))) > 1:
        raise RunError(
            "the ranks hold different averaged weights: a fault in MPI or in memory; run swap-hpc doctor"
        )
    return digest


AT_ONCE = {
    "cpu": 2**15,
    "cuda": 2**22,
}  # elements whose products are in memory together: in a cache; few kernels


INTEGERS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int32,
}  # by the bytes of an element, which of 8 are two


def check_agreement(model: nn.Module, team: Team, where: str) -> None:
    """Raises RunError, on all ranks of `team`, where the weights of `model` are not alike on them.

    They start alike and take the same steps, so they differ only where gradients were not averaged, by a fault of Horovod,
    NCCL, the network or memory, or where processors round a step in other ways. One small collective; the weights stay
    where they are.

    `where`: the place in training, for the message.
    """
    if team.size == 1:
        return
    mine = fingerprint(averaged_tensors(model).values())
    halves = (float(mine >> 32), float(mine & 0xFFFFFFFF))  # which float64 holds exactly
    largest = team.maximum(*halves, *(-half for half in halves))
    if largest[:2] == [-least for least in largest[2:]]:
        return
    others = team.allgather(mine)
    rank = next(rank for rank, other in enumerate(others) if other != others[0])
    raise RunError(
        f"the weights of rank {rank} differ from those of rank 0 after {where}: their gradients were not averaged; "
        "mpirun ... swap-hpc doctor tries a step on these devices"
    )


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor]) -> int:
    """64 bits that tell tensors apart, from all of their bits and their order. Computed where the tensors lie.

    Each tensor's elements, taken as integers of at most 32 bits, are summed modulo 2^64, each times an odd number of its
    own: a change of one element always changes the sum.
    """
    sums = [_sum(tensor) for tensor in tensors]
    if (
        len({each.device for each in sums}) == 1
    ):  # one copy from the GPU instead of one for each tensor
        sums = list(torch.stack(sums).cpu())
    told = np.array([int(each) for each in sums], np.int64).tobytes()
    return int.from_bytes(hashlib.sha256(told).digest()[:8], "little")


def _sum(tensor: Tensor) -> Tensor:
    """Scalar int64, on the tensor's device."""
    plain = real(once(tensor.detach())).contiguous().view(-1)
    bits = plain.view(INTEGERS[plain.element_size()])
    odd = torch.arange(1, 2 * min(AT_ONCE[bits.device.type], len(bits)) + 1, 2, device=bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), AT_ONCE[bits.device.type]):
        part = bits[start : start + len(odd)].to(torch.int64)
        total += (
            part * odd[: len(part)]
        ).sum() + 2 * start * part.sum()  # each times 2 * its place + 1
    return total
