"""Weights, buffers and extra states of one rank, given to the others of its team."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from swap_hpc.average.kinds import team_means
from swap_hpc.average.state import extra_states, set_extra_states_
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import assign_, from_bytes, once, real, tensor_bytes


def _share_extra_states_(
    model: nn.Module, team: Team, mine: Mapping[str, Tensor] = MappingProxyType({})
) -> None:
    """Gives every rank of `team` the first one's extra states: those of `mine`, or those that the model has."""
    states = extra_states(model)
    if states:
        shared = team.broadcast(
            {name: tensor_bytes(mine.get(name, state)) for name, state in states.items()}
        )
        set_extra_states_(model, {name: torch.from_numpy(state) for name, state in shared.items()})


@torch.no_grad()
def broadcast_weights_(model: nn.Module, team: Team) -> None:
    """Gives every rank of `team` the first one's parameters, buffers and extra states, whatever their types."""
    if team.size > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            assign_(tensor, broadcast_tensors([tensor], team)[0])
        _share_extra_states_(model, team)


def broadcast_tensors(tensors: list[Tensor], team: Team) -> list[Tensor]:
    """The first rank's `tensors`, on the CPU; as bytes of one message, since MPI does not know every type."""
    mine = [tensor_bytes(tensor) for tensor in tensors]
    packed = team.broadcast_(np.concatenate([np.empty(0, np.uint8), *mine]))
    ends = np.cumsum([len(each) for each in mine])
    parts = [
        torch.from_numpy(packed[end - len(each) : end])
        for each, end in zip(mine, ends, strict=True)
    ]
    return [from_bytes(part, t.dtype, t.shape) for part, t in zip(parts, tensors, strict=True)]


@torch.no_grad()
def average_buffers_(model: nn.Module, team: Team) -> None:
    """Makes buffers alike on all ranks of `team`, each of which saw other shares of the batches.

    Running statistics of the layers that are in training mode become their mean over the ranks, all other buffers the
    first rank's.
    """
    if team.size == 1:
        return
    means = {name: once(buffer) for name, buffer in team_means(model).items()}
    places = {buffer.data_ptr() for buffer in means.values()}
    others = [b for b in model.buffers() if b.data_ptr() not in places]
    for buffer, first in zip(others, broadcast_tensors(others, team), strict=True):
        assign_(buffer, first)
    if not means:
        return
    packed = torch.cat([real(b).reshape(-1) for b in means.values()]).to("cpu", torch.float64)
    mean = torch.from_numpy(team.sum_(packed.numpy())) / team.size
    for buffer, values in zip(
        means.values(), mean.split([real(b).numel() for b in means.values()]), strict=True
    ):
        real(buffer).copy_(values.view(real(buffer).shape))


def share_extra_states_(model: nn.Module, team: Team) -> None:
    """Gives every rank of `team` the first one's extra states (`get_extra_state`)."""
    if team.size > 1:
        _share_extra_states_(model, team)
