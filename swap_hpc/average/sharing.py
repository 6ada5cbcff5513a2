"""The ranks of a team made alike: the first rank's weights, buffers and extra states for all."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from swap_hpc.average.kinds import team_means
from swap_hpc.average.state import extra_states, set_extra_states_
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import assign_, from_bytes, once, real, tensor_bytes


@torch.no_grad()
def broadcast_weights_(model: nn.Module, team: Team) -> None:
    """Give all ranks the first one's parameters, buffers and extra states. Collective."""
    if team.size > 1:
        # One tensor at a time, because its bytes are copied twice on the host.
        for tensor in (*model.parameters(), *model.buffers()):
            assign_(tensor, broadcast_tensors([tensor], team)[0])
        share_extra_states_(model, team)


def broadcast_tensors(tensors: Sequence[Tensor], team: Team) -> list[Tensor]:
    """Return the first rank's tensors, on the CPU. Collective.

    They are sent as the bytes of one message, because MPI does not know every type of torch's.

    Args:
        tensors: of the same number, types and shapes on all ranks.
        team: the ranks.
    """
    mine = [tensor_bytes(tensor) for tensor in tensors]
    packed = team.broadcast_(np.concatenate([np.empty(0, np.uint8), *mine]))
    parts = torch.from_numpy(packed).split([len(each) for each in mine])
    return [from_bytes(part, t.dtype, t.shape) for part, t in zip(parts, tensors, strict=True)]


def average_buffers_(model: nn.Module, team: Team) -> None:
    """Make buffers alike on ranks that have seen different shares of the batches. Collective.

    Running statistics of the layers that are in training mode become their mean over the ranks, and
    all other buffers the first rank's.
    """
    means = [once(buffer) for buffer in team_means(model).values()]
    places = {buffer.data_ptr() for buffer in means}
    others = [buffer for buffer in model.buffers() if buffer.data_ptr() not in places]
    average_tensors_(means, others, team)


@torch.no_grad()
def average_tensors_(means: Sequence[Tensor], others: Sequence[Tensor], team: Team) -> None:
    """Replace tensors by their mean over the ranks, and others by the first rank's. Collective.

    Args:
        means: tensors of the same number, types and shapes on all ranks.
        others: likewise.
        team: the ranks.
    """
    if team.size == 1:
        return
    for tensor, first in zip(others, broadcast_tensors(others, team), strict=True):
        assign_(tensor, first)
    if means:
        _average_(means, team)


def _average_(tensors: Sequence[Tensor], team: Team) -> None:
    """Replace tensors by their mean over the ranks, summed in float64 and rounded once."""
    parts = [real(tensor) for tensor in tensors]
    packed = torch.cat([part.reshape(-1) for part in parts]).to("cpu", torch.float64)
    mean = torch.from_numpy(team.sum_(packed.numpy())) / team.size
    sizes = [part.numel() for part in parts]
    for part, values in zip(parts, mean.split(sizes), strict=True):
        part.copy_(values.view(part.shape))


def share_extra_states_(model: nn.Module, team: Team) -> None:
    """Give all ranks the first one's extra states (`get_extra_state`). Collective."""
    if team.size > 1:
        set_extra_states_(model, broadcast_states(extra_states(model), team))


def broadcast_states(states: Mapping[str, Tensor], team: Team) -> dict[str, Tensor]:
    """Return the first rank's extra states. Collective, if there are any.

    Args:
        states: name -> bytes, (n,) uint8. The names are the same on all ranks, lengths may differ.
        team: the ranks.
    """
    if not states:
        return {}
    first = team.broadcast({name: tensor_bytes(state) for name, state in states.items()})
    return {name: torch.from_numpy(state) for name, state in first.items()}
