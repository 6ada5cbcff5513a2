"""Tensors of any type, shape and layout: their bytes, their numbers, and new values for them."""

import numpy as np
import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor, in C order, (nbytes,) uint8, on the CPU."""
    return (
        tensor.detach()
        .cpu()
        .resolve_conj()
        .resolve_neg()
        .contiguous()
        .view(-1)
        .view(torch.uint8)
        .numpy()
    )


def from_bytes(values: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """The reverse of `tensor_bytes`, on the CPU, in memory of its own."""
    if not values.numel():
        return torch.empty(shape, dtype=dtype)
    return values.clone().view(dtype).view(shape)  # a copy lies where its type may


def real(tensor: Tensor) -> Tensor:
    """A view of a complex tensor as real numbers, (..., 2); any other tensor as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def has_numbers(tensor: Tensor) -> bool:
    """Tell floating-point and complex tensors, which have a mean, from integers and truth values."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_dense(tensor: Tensor) -> bool:
    """Tell whether a tensor's elements fill its memory without gaps and overlaps, in whatever order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def once(tensor: Tensor) -> Tensor:
    """A view in which each element of an expanded tensor, whose dimensions repeat one place in memory, appears once."""
    for dimension, (stride, size) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


@torch.no_grad()
def assign_(tensor: Tensor, values: Tensor) -> None:
    """Gives a tensor, which may be an expanded one, new values of the same shape."""
    target = once(tensor)
    source = values.view(tensor.shape)
    for dimension, size in enumerate(target.shape):
        source = source.narrow(dimension, 0, size)
    target.copy_(source)
