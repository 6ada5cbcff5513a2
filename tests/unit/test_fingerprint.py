"""A fingerprint of tensors changes with any of their bits, and with nothing else."""

import pytest
import torch
from torch import Tensor

from swap_hpc.average import agreement
from swap_hpc.average.agreement import fingerprint

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.uint8,
]


def values(dtype: torch.dtype, size: int = 1000) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    if dtype.is_complex:
        return torch.randn(size, dtype=dtype, generator=generator)
    return torch.randn(size, generator=generator).mul(50).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_bit_counts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "ELEMENTS_AT_ONCE", {"cpu": 64})  # several parts
    tensor = values(dtype)
    known = {fingerprint([tensor])}
    content = tensor.view(torch.uint8)
    places = range(0, len(content), 97)
    for place in places:
        for bit in (0, 7):
            content[place] ^= 1 << bit
            known.add(fingerprint([tensor]))
            content[place] ^= 1 << bit
    assert len(known) == 1 + 2 * len(places)
    assert fingerprint([tensor]) in known


def test_order_counts_and_layout_does_not() -> None:
    one, other = values(torch.float32), values(torch.float32, 500)
    assert fingerprint([one, other]) != fingerprint([other, one]) != fingerprint([one])
    assert fingerprint([one.flip(0)]) != fingerprint([one])
    weights = values(torch.float32, 2 * 3 * 4 * 5).view(2, 3, 4, 5)
    transposed = weights.transpose(0, 1).contiguous().transpose(0, 1)
    for same in (weights.to(memory_format=torch.channels_last), transposed):
        assert fingerprint([same]) == fingerprint([weights])


def test_parts_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = values(torch.float32)
    whole = fingerprint([tensor])
    monkeypatch.setattr(agreement, "ELEMENTS_AT_ONCE", {"cpu": 7})
    assert fingerprint([tensor]) == whole


def test_empty_and_scalar_tensors_have_one() -> None:
    assert fingerprint([]) == fingerprint([]) != fingerprint([torch.zeros(0)])
    assert fingerprint([torch.tensor(1.0)]) != fingerprint([torch.tensor(2.0)])
    assert fingerprint([torch.tensor(float("nan"))]) == fingerprint([torch.tensor(float("nan"))])
