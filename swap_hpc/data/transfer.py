"""Copies of arrays to a device, which the host does not wait for."""

import numpy as np
import torch
from torch import Tensor


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
