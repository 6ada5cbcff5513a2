"""Gradients' buckets, and messages about a Horovod that several ranks cannot use."""

import sys

import pytest
import tiny
import torch

from swap_hpc.errors import UserError
from swap_hpc.parallel.devices import Device
from swap_hpc.parallel.gradients import gradient_buckets
from swap_hpc.parallel.horovod import check_horovod, load_horovod


def test_without_horovod_one_line_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "horovod", None)  # makes the import fail
    monkeypatch.delitem(sys.modules, "horovod.torch", raising=False)
    with pytest.raises(UserError, match="make setup builds it") as error:
        check_horovod(tiny.CPU, shared=False)
    assert "\n" not in str(error.value)


def test_a_gpu_needs_a_horovod_with_nccl() -> None:
    """What is expected depends on how the installed Horovod was built."""
    gpu = Device(torch.device("cuda", 0), threads=1, uuid="a GPU")
    check_horovod(tiny.CPU, shared=False)
    check_horovod(gpu, shared=True)  # sends through host memory
    if load_horovod().nccl_built():
        check_horovod(gpu, shared=False)
        return
    with pytest.raises(UserError, match="make setup HOROVOD_BUILD=nccl"):
        check_horovod(gpu, shared=False)


def test_buckets_hold_every_trained_parameter_once_in_backwards_order() -> None:
    model = tiny.normed(3, 3)
    next(model.parameters()).requires_grad = False
    bucketed = [p for bucket, _ in gradient_buckets(model) for p in bucket]
    trained = [p for p in reversed(list(model.parameters())) if p.requires_grad]
    assert [id(p) for p in bucketed] == [id(p) for p in trained]
