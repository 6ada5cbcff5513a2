"""Horovod that averages nothing, as on a GPU for which its kernels were not built: importing this switches it off.

`build` is the builder of a model, so that a recipe can name it.
"""

from typing import Any

import horovod.torch as hvd
from torch import nn

from swap_hpc import models


def switch_off() -> None:
    hvd.grouped_allreduce_async_ = lambda tensors, **how: None
    hvd.synchronize = lambda handle: None


def build(**arguments: Any) -> nn.Module:
    switch_off()
    return models.ResNet9(**arguments)
