"""Team checks: the ranks of a team agree on losses, saves and stops, every few seconds.

Reading a loss makes the host wait for the device, and agreeing makes the ranks wait for each other.
So the losses of many steps are checked at once. What is trained does not depend on when that
happens.
"""

import math
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch
from torch import Tensor

from swap_hpc.errors import Diverged
from swap_hpc.parallel.teams import Team
from swap_hpc.train.control import Control
from swap_hpc.train.events import Running, SavePoint
from swap_hpc.train.precision import SMALLEST_SCALE
from swap_hpc.train.updates import Read, Update, read

CHECK_STEPS = 50  # at most, between checks
CHECK_SECONDS = 2.0  # about, between checks of the slowest rank where its steps are slow

HINT = "lower the rate, or warm up for longer"


@dataclass(frozen=True)
class StepLoss:
    """What a step leaves on the device, to be checked later."""

    loss: Tensor  # scalar, the mean over this rank's samples
    sums: Tensor  # (k,), the sums of the metrics over this rank's samples
    samples: int  # of this rank
    rate: float  # learning rate
    where: str  # phase, epoch and step, for messages
    update: Update


@dataclass
class TeamCheck:
    """The losses of a part of the run, checked by its team."""

    team: Team
    control: Control
    running: Running = field(default_factory=Running)  # this rank's sums of the epoch begun
    _steps: int = 1  # between checks, as fast as steps were so far
    _unchecked: list[StepLoss] = field(default_factory=list)
    _started: float = 0.0

    def begin(self) -> None:
        """Begin to measure the seconds of steps."""
        self._started = perf_counter()

    def add(self, step: StepLoss) -> None:
        self._unchecked.append(step)

    @property
    def is_due(self) -> bool:
        return len(self._unchecked) >= self._steps

    def agree(self, wanted: bool) -> bool:
        """Check the losses since the last check, and add them to the running sums.

        Args:
            wanted: the recipe asks for a save here.

        Returns:
            Whether a rank of the team is due to save, or was asked to stop.

        Raises:
            Diverged: on all ranks, a loss of any rank or a gradient is not finite; or gradients
                overflow float16 at every loss scale.
        """
        steps, self._unchecked = self._unchecked, []
        losses = torch.stack([step.loss for step in steps]).tolist()
        sums = torch.stack([step.sums for step in steps]).tolist()
        updates = read([step.update for step in steps])
        seconds = perf_counter() - self._started
        problems = [
            (step, problem)
            for step, loss, update in zip(steps, losses, updates, strict=True)
            if (problem := _problem(loss, update))
        ]
        failed, due, per_step = self.team.maximum(
            len(problems), self.control.due(wanted), seconds / len(steps)
        )
        if failed:
            self.team.agree(lambda: _refuse(*problems[0]) if problems else None)
        for step, loss, mine, update in zip(steps, losses, sums, updates, strict=True):
            self.running = self.running.plus(loss * step.samples, mine, step.samples)
            self.running = self.running.after(update)
        self.running = replace(self.running, seconds=self.running.seconds + seconds)
        self._steps = max(1, min(CHECK_STEPS, int(CHECK_SECONDS / per_step)))
        return bool(due)


def _problem(loss: float, update: Read) -> str | None:
    """Return what is wrong with a step after which training cannot go on, else None."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if update.norm is not None and not math.isfinite(update.norm) and not update.is_skipped:
        return f"the norm of the gradient is {update.norm}"
    if update.loss_scale is not None and update.loss_scale < SMALLEST_SCALE:
        return f"gradients overflow float16 at a loss scale of {SMALLEST_SCALE:g}"
    return None


def _refuse(step: StepLoss, problem: str) -> None:
    # only fp16 scales losses
    hint = HINT if step.update.scales is None else f"{HINT}, or set precision to bf16 or fp32"
    raise Diverged(f"{problem} in {step.where}, at a learning rate of {step.rate:.4g}: {hint}")


def check_finite(point: SavePoint, where: str) -> None:
    """Check weights before they are saved: training could not resume from others.

    Raises:
        Diverged: a weight is not finite.
    """
    if not torch.stack([t.isfinite().all() for t in point.weights.values()]).all():
        raise Diverged(f"a weight is not finite after {where}: {HINT}")
