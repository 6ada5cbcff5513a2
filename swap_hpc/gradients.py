"""The mean of a team's gradients, by Horovod. The only module that imports it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from swap_hpc.devices import Device
from swap_hpc.errors import UserError
from swap_hpc.ranks import Team

# Horovod fuses gradients as they happen to arrive, and a ring sums an element in an order that depends on its place in
# the buffer. Fixed buckets, never fused with each other, make two identical runs identical to the bit. A handful of
# them still overlaps communication with the backward pass.
BUCKETS = 4
os.environ.setdefault("HOROVOD_DISABLE_GROUP_FUSION", "1")


def end_stalls(seconds: float) -> None:
    """Lets Horovod end a phase in which a rank does not send its gradients, half as late again as that many seconds (0: never)."""
    if seconds:
        os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(max(1, min(60, int(seconds / 2)))))
        os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(max(2, int(1.5 * seconds))))


def load_horovod() -> Any:
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise UserError(
            f"several ranks train one model with Horovod, which cannot be loaded here ({error}): make setup builds it"
        ) from None
    return hvd


def check_horovod(device: Device) -> None:
    """Raises UserError where several ranks cannot train one model on this device, with the command that mends it."""
    if not load_horovod().nccl_built() and device.torch.type == "cuda":
        raise UserError("this Horovod was built without NCCL and cannot reduce gradients on GPUs: make setup HOROVOD_BUILD=nccl")


@contextmanager
def averaged_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, team: Team, device: Device, passes: int = 1
) -> Iterator[torch.optim.Optimizer]:
    """`optimizer`, stepping with gradients averaged over `team`, whose ranks hold equal weights. `passes`: backward passes per step.

    Horovod is started on the team's communicator and shut down at the end, or when all leave training, so that no thread of
    it runs in other parts of a run. Its hooks stay on the model's parameters: train on with a deep copy, which carries none. A team of one
    never touches Horovod.
    """
    if team.size == 1:
        yield optimizer
        return
    hvd = load_horovod()
    through_host = device.is_shared(team)
    if device.torch.type == "cpu":
        # Horovod's thread wakes up every millisecond to ask the other ranks; with the model on the same core that costs a third of the step
        os.environ.setdefault("HOROVOD_CYCLE_TIME", "5")
    hvd.init(team.comm)
    try:
        if through_host:
            hook = optimizer.register_step_pre_hook(lambda *_: _average_through_host(model, hvd))
            try:
                yield optimizer
            finally:
                hook.remove()
        else:
            yield hvd.DistributedOptimizer(
                optimizer, named_parameters=model.named_parameters(), groups=_buckets(model), backward_passes_per_step=passes
            )
    except GeneratorExit:  # all ranks leave training before its end; at an error of one rank the others may not be there to shut down with
        hvd.shutdown()
        raise
    hvd.shutdown()


def _buckets(model: nn.Module) -> list[list[nn.Parameter]]:
    """The trained parameters in `BUCKETS` groups of about equal size, in the order in which backward reaches them."""
    parameters = [p for p in reversed(list(model.parameters())) if p.requires_grad]
    total, seen = sum(p.numel() for p in parameters), 0
    buckets: list[list[nn.Parameter]] = [[] for _ in range(BUCKETS)]
    for p in parameters:
        buckets[min(BUCKETS - 1, seen * BUCKETS // total)].append(p)
        seen += p.numel()
    return [bucket for bucket in buckets if bucket]


def _average_through_host(model: nn.Module, hvd: Any) -> None:
    """Gradients of ranks that share a GPU: packed, copied to the host, averaged there by MPI, copied back."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    packed = torch.cat([g.flatten() for g in gradients]).cpu()
    hvd.allreduce_(packed, name="gradients", op=hvd.Average)
    averaged = packed.to(gradients[0].device).split([g.numel() for g in gradients])
    for gradient, mean in zip(gradients, averaged, strict=True):
        gradient.copy_(mean.view_as(gradient))
