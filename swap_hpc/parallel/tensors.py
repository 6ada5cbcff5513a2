"""Tensors of any type, shape and layout: their bytes, their numbers, and new values for them."""

import numpy as np
import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> np.ndarray:
    """Return the bytes of a tensor's elements in C order, (nbytes,) uint8, on the CPU."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.view(-1).view(torch.uint8).numpy()


def from_bytes(values: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """Return a new tensor, on the CPU, from its bytes: the reverse of `tensor_bytes`.

    Args:
        values: (nbytes,) uint8.
        dtype: the tensor's.
        shape: the tensor's.
    """
    if not values.numel():
        return torch.empty(shape, dtype=dtype)
    # A slice of bytes may begin at an address that `dtype` does not allow; a copy does not.
    return values.clone().view(dtype).view(shape)


def real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as a view of real numbers, (..., 2); any other tensor as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def has_numbers(tensor: Tensor) -> bool:
    """Tell whether a tensor's type has a mean: floating-point or complex, not integer or bool."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_dense(tensor: Tensor) -> bool:
    """Tell whether a tensor's elements fill its memory without gaps and overlaps.

    The order of its dimensions in memory does not matter.
    """
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def once(tensor: Tensor) -> Tensor:
    """Return a view in which each element of an expanded tensor appears once.

    An expanded tensor repeats one place in memory along a dimension, whose stride is 0.
    """
    for dimension, (stride, size) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


@torch.no_grad()
def assign_(tensor: Tensor, values: Tensor) -> None:
    """Copy values of the same shape into a tensor, which may be an expanded one."""
    target = once(tensor)
    source = values.view(tensor.shape)
    for dimension, size in enumerate(target.shape):
        source = source.narrow(dimension, 0, size)
    target.copy_(source)
