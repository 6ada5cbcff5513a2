"""The buffers of all ranks of a team in one file: each rank saw its own share of a batch."""

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from swap_hpc.average.state import is_extra
from swap_hpc.parallel.tensors import from_bytes, real, tensor_bytes
from swap_hpc.run.weights import Tensors


def packed(buffers: Tensors) -> np.ndarray:
    """Return the bytes of all buffers, in the order of their names, (n,) uint8.

    The bytes of an extra state follow their number: it need not be the same on all ranks.
    """
    parts: list[np.ndarray] = [np.empty(0, np.uint8)]
    for name, tensor in sorted(buffers.items()):
        content = tensor_bytes(tensor)
        if is_extra(name):
            parts.append(np.array([len(content)], np.int64).view(np.uint8))
        parts.append(content)
    return np.concatenate(parts)


def unpacked(row: Tensor, like: Tensors) -> Tensors:
    """Return the buffers that `packed` packed.

    Args:
        row: the bytes, (n,) uint8.
        like: buffers of the same names, types and shapes.
    """
    found: Tensors = {}
    start = 0
    for name, tensor in sorted(like.items()):
        size = tensor.numel() * tensor.element_size()
        if is_extra(name):
            size = int(row[start : start + 8].clone().view(torch.int64))
            start += 8
        content = row[start : start + size]
        if is_extra(name):
            found[name] = content.clone()
        else:
            found[name] = from_bytes(content, tensor.dtype, tensor.shape)
        start += size
    return found


def mean_of(rows: list[Tensors], means: Collection[str]) -> Tensors:
    """Return the buffers that another number of ranks resumes from.

    Args:
        rows: the buffers of each rank.
        means: the names of those whose mean over the ranks counts, rounded once; of the others the
            first rank's do.
    """
    found = dict(rows[0])
    for name in means:
        mean = real(torch.stack([row[name] for row in rows])).double().mean(0)
        like = rows[0][name]
        found[name] = (torch.view_as_complex(mean) if like.is_complex() else mean).to(like.dtype)
    return found
