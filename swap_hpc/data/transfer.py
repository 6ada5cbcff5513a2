"""Arrays as tensors, and copies to a device, which the host does not wait for."""

import warnings

import numpy as np
import torch
from torch import Tensor


def as_tensor(values: np.ndarray) -> Tensor:
    """Return a tensor that shares an array's memory, to be read only: the array may be read-only.

    torch warns of such an array, since it has no read-only tensors.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(values)


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Return an array as a tensor on a device.

    The host does not wait for a copy to a GPU, and may change `values` at once. On the CPU the
    tensor shares the array's memory.
    """
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)
