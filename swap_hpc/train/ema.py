"""The exponential moving average (EMA) of a model's weights along its training."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from swap_hpc.average.kinds import team_means
from swap_hpc.average.sharing import average_tensors_
from swap_hpc.average.state import entries_of, is_extra
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import assign_, has_numbers


class MovingAverage:
    """The average of a model's weights, of which those after the latest steps count most.

    After each step: average = decay * average + (1 - decay) * weights. It begins with the weights
    that the model has when it is made.

    Averaged are all floating-point and complex tensors of the state dict, also batch norm's running
    statistics, as by timm's ModelEmaV3, and by torch's AveragedModel with `use_buffers`. Integer
    buffers and extra states are the model's. An average of 16-bit tensors is kept in float32, which
    can take up small changes.

    Attributes:
        averages: name in the state dict -> the average, a tensor on the model's device. The ranks
            of a team have the same averages of parameters; those of buffers are this rank's own
            until `share_buffers_`.
    """

    def __init__(self, model: nn.Module, decay: float):
        """
        Args:
            model: in training; it is not kept.
            decay: in (0, 1), for each step.
        """
        self.averages = {name: _widened(tensor) for name, tensor in _averaged(model).items()}
        self._update = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update_(self, model: nn.Module) -> None:
        """Take in the weights of `model` after a step."""
        # Tensors of one type are updated together: on a GPU, by few kernels.
        pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for name, tensor in _averaged(model).items():
            average = self.averages[name]
            if average.numel():
                averages, values = pairs[average.dtype]
                averages.append(average)
                values.append(tensor.to(average.dtype))
        for averages, values in pairs.values():
            self._update(averages, values, 0)

    def restore_(self, averages: Mapping[str, Tensor]) -> None:
        """Go on from averages that were saved."""
        for name, saved in averages.items():
            self.averages[name].copy_(saved)

    def share_buffers_(self, model: nn.Module, team: Team) -> None:
        """Make the averages of buffers alike on all ranks, as those of `model` are. Collective."""
        buffers = entries_of(model, model.buffers()) & self.averages.keys()
        means = entries_of(model, team_means(model).values()) & buffers
        average_tensors_(
            [self.averages[name] for name in sorted(means)],
            [self.averages[name] for name in sorted(buffers - means)],
            team,
        )

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Let `model` hold the average until the context ends; then its own weights again."""
        own = {name: tensor.clone() for name, tensor in _averaged(model).items()}
        _fill_(model, self.averages)
        try:
            yield
        finally:
            _fill_(model, own)


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the state dict that are averaged: the model's own."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not is_extra(name) and has_numbers(tensor)
    }


def _widened(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, a 16-bit one as float32."""
    is_narrow = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.to(torch.float32 if is_narrow else tensor.dtype, copy=True)


def _fill_(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, tensor in _averaged(model).items():
        assign_(tensor, values[name])
