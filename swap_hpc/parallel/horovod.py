"""Horovod in this process: whether it can be used, its settings, its start and its end.

The only module that imports it. A process has one Horovod, on one communicator at a time.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.devices import Device
from swap_hpc.parallel.teams import Team

# Horovod would fuse gradients as they happen to arrive, and a ring sums an element in an order that
# depends on its place in the fused buffer. Without fusion, two identical runs are identical to the
# bit.
os.environ.setdefault("HOROVOD_DISABLE_GROUP_FUSION", "1")

_sessions = 0  # begun in this process


def load_horovod() -> Any:
    """Import Horovod's torch module.

    Raises:
        UserError: it is not installed, or it does not load.
    """
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise UserError(
            "several ranks train one model with Horovod, "
            f"which cannot be loaded here ({error}): make setup builds it"
        ) from None
    return hvd


def check_horovod(device: Device, shared: bool) -> None:
    """Check that several ranks can train one model on a device.

    Args:
        device: this rank's.
        shared: two ranks use one GPU, so that gradients go through host memory and not by NCCL.

    Raises:
        UserError: they cannot; the message names the command that helps.
    """
    needs_nccl = device.torch.type == "cuda" and not shared
    if not load_horovod().nccl_built() and needs_nccl:
        raise UserError(
            "this Horovod was built without NCCL and cannot reduce gradients on GPUs: "
            "make setup HOROVOD_BUILD=nccl"
        )


def end_stalls(seconds: float) -> None:
    """Let Horovod fail when a rank sends no gradients for 1.5 times as long as `seconds`.

    It is the second net below the watchdog's limit. Values that the user set are kept.

    Args:
        seconds: the watchdog's limit; 0 for none.
    """
    if seconds:
        warn_after = max(1, min(60, int(seconds / 2)))
        fail_after = max(2, int(1.5 * seconds))
        os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(warn_after))
        os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(fail_after))


@dataclass(frozen=True)
class Session:
    """A training's use of this process's Horovod, which the next training takes away from it."""

    hvd: Any  # the module horovod.torch
    number: int

    @property
    def is_current(self) -> bool:
        return self.number == _sessions

    def check_current(self) -> None:
        """Check that no other training has begun since.

        Raises:
            RunError: one has.
        """
        if not self.is_current:
            raise RunError(
                "another training of this process has begun since, and has its Horovod: "
                "end one before the next begins"
            )


@contextmanager
def horovod_session(team: Team, device: Device) -> Iterator[Session]:
    """Run Horovod on the communicator of `team` until the context ends. Collective.

    No thread of Horovod is then left in other parts of a run. Horovod also ends when all ranks
    leave training early. It goes on after an error, whose rank might wait in vain for the others to
    shut down with it.

    Raises:
        UserError: Horovod cannot be loaded, or torch.distributed connects the ranks.
    """
    if not hasattr(team.comm, "Get_rank"):
        raise UserError(
            "several ranks train one model with Horovod, which needs MPI, and torch.distributed "
            f"connects these: start them with mpirun -n {team.size}"
        )
    hvd = load_horovod()
    if device.torch.type == "cpu":
        # Horovod's thread wakes up every millisecond to ask the other ranks. Where it shares a core
        # with the model, that costs a third of the step.
        os.environ.setdefault("HOROVOD_CYCLE_TIME", "5")
    # Horovod 0.28.1 crashes when it starts a second time with this set beside HOROVOD_CYCLE_TIME.
    # Nothing is fused here, so that it has no effect.
    os.environ.pop("HOROVOD_FUSION_THRESHOLD", None)
    if hvd.is_initialized():
        # A training that an error ended left it running, perhaps on another communicator, which
        # init() would keep.
        hvd.shutdown()
    hvd.init(team.comm)
    global _sessions
    _sessions += 1
    session = Session(hvd, _sessions)
    try:
        yield session
    except GeneratorExit:
        # All ranks leave training before its end. Or Python frees a generator that an error left
        # suspended: by then Horovod may be another training's.
        if session.is_current:
            hvd.shutdown()
        raise
    if session.is_current:
        hvd.shutdown()
