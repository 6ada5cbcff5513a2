"""Checks that ranks hold the same weights, to the bit: a hash, and a cheaper fingerprint."""

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

# Elements whose products `fingerprint` holds in memory together: few enough for a CPU's cache, and
# many enough for few kernels on a GPU.
ELEMENTS_AT_ONCE = {"cpu": 2**15, "cuda": 2**22}

# Element bytes -> the integer type that `fingerprint` reads; an element of 8 bytes counts as two.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of a model's state dict: `weights_sha256` in a run's `result.json`.

    It covers the sorted names, the types, the shapes, and the elements' bytes in C order.
    """
    return hashed(state_of(model)).hexdigest()


def hashed(tensors: Mapping[str, Tensor]) -> "hashlib._Hash":
    """Return the SHA-256 of tensors: their sorted names, types, shapes and C-ordered bytes.

    The bytes are those of a little-endian host, as all hosts of torch are.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name} {dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor).data)
    return digest


def check_equal(model: nn.Module, team: Team) -> str:
    """Return the hash of `model`, which must be the same on all ranks of `team`. Collective.

    Raises:
        RunError: on all ranks, two ranks have different hashes.
    """
    digest = weights_sha256(model)
    if team.first_unlike(digest.encode()) is not None:
        raise RunError(
            "the ranks hold different averaged weights: "
            "a fault in MPI or in memory; run swap-hpc doctor"
        )
    return digest


def check_agreement(model: nn.Module, team: Team, where: str) -> None:
    """Check that the ranks that train one model hold the same weights. Collective.

    They begin with the same weights and take the same steps. So their weights differ only if
    gradients were not averaged, through a fault of Horovod, NCCL, the network or memory, or if
    their processors round differently. The check is one small collective; no weights are sent.

    Args:
        model: this rank's.
        team: the ranks that train it together.
        where: the place in training, for the message.

    Raises:
        RunError: on all ranks, the weights of two ranks differ.
    """
    if team.size == 1:
        return
    mine = fingerprint(averaged_tensors(model).values())
    rank = team.first_unlike(mine.to_bytes(8, "little"))
    if rank is None:
        return
    raise RunError(
        f"the weights of rank {rank} differ from those of rank 0 after {where}: "
        "their gradients were not averaged; "
        "mpirun ... swap-hpc doctor tries a step on these devices"
    )


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor]) -> int:
    """Return a 64-bit hash of all bits of tensors and of their order.

    It is computed on the tensors' own device: only 8 bytes per tensor are copied from a GPU. Each
    tensor's elements, taken as integers of at most 32 bits, are multiplied by the odd numbers 1, 3,
    5 ... and summed modulo 2^64. A change of a single element always changes that sum, because odd
    numbers are invertible there.
    """
    sums = [_weighted_sum(tensor) for tensor in tensors]
    if len({each.device for each in sums}) == 1:
        sums = list(torch.stack(sums).cpu())  # one copy from the GPU instead of one per tensor
    content = np.array([int(each) for each in sums], np.int64).tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def _weighted_sum(tensor: Tensor) -> Tensor:
    """Return the sum of each element times 2 * place + 1, a scalar int64 on the tensor's device."""
    plain = real(once(tensor.detach())).contiguous().view(-1)
    integers = plain.view(INTEGERS[plain.element_size()])
    device = integers.device
    at_once = ELEMENTS_AT_ONCE[device.type]
    odd = torch.arange(1, 2 * min(at_once, len(integers)) + 1, 2, device=device)
    total = torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, len(integers), at_once):
        part = integers[start : start + len(odd)].to(torch.int64)
        # The place of element i of the part is start + i.
        total += (part * odd[: len(part)]).sum() + 2 * start * part.sum()
    return total
