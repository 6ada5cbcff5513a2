"""One step of training: gradients of a rank's share of a batch, then the optimizer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils.clip_grad import clip_grad_norm_

from swap_hpc.data.nested import cut
from swap_hpc.data.seeding import seed_all
from swap_hpc.train.job import Batch, Job
from swap_hpc.train.objective import as_float32
from swap_hpc.train.parameter_groups import SCALE
from swap_hpc.train.precision import UNSCALED
from swap_hpc.train.updates import Update


@dataclass(frozen=True)
class Stepper:
    """Takes the training steps of one part of a run."""

    forward: Callable[[Any], Any]  # the model, compiled or not
    optimizer: torch.optim.Optimizer
    average_gradients: Callable[[], None]  # over the team, after the backward pass; collective
    scaler: GradScaler  # of losses and gradients; it does nothing but in fp16
    job: Job
    accumulate: int  # equal parts into which a rank's share of a batch is cut

    def compute_gradients(self, batch: Batch, rate: float, seed: int) -> tuple[Tensor, Tensor]:
        """Compute the gradients of this rank's share of a step, in place of those before.

        The global generators are seeded and the learning rate is set first.

        Args:
            batch: images (n, C, H, W) float32 and labels (n,) int64, or what the data set yields.
            rate: the learning rate of the step.
            seed: of the global generators, from which dropout draws.

        Returns:
            The mean loss, a scalar, and the sums of the metrics of the share, (k,), on the device.
        """
        seed_all(seed)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get(SCALE, 1.0)
        self.optimizer.zero_grad()
        return backward(self.forward, batch, self.job, self.accumulate, self.scaler)

    def update(self, seed: int | None) -> Update:
        """Average the gradients over the team, clip them, and step.

        In fp16 the ranks skip the same steps, because the check for an overflow sees the mean.

        Args:
            seed: of the global generators, for an optimizer that draws from them: the same on all
                ranks of the team. None: they are left alone.
        """
        self.average_gradients()
        if seed is not None:
            seed_all(seed)
        self.scaler.unscale_(self.optimizer)
        norm, clip_norm = None, self.job.recipe.optimizer.clip_norm
        if clip_norm is not None:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            norm = clip_grad_norm_(trained, clip_norm)
        if not self.scaler.is_enabled():
            self.optimizer.step()
            return Update(norm, clip_norm)
        before = self._loss_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return Update(norm, clip_norm, torch.stack([before, self._loss_scale()]))

    def _loss_scale(self) -> Tensor:
        """Return the present scale, a new scalar on the device, without waiting for it."""
        return self.scaler.scale(torch.ones((), device=self.job.device.torch))


def backward(
    forward: Callable[[Any], Any],
    batch: Batch,
    job: Job,
    parts: int,
    scaler: GradScaler = UNSCALED,
) -> tuple[Tensor, Tensor]:
    """Add the gradients of a rank's share of a step to those that the model has.

    Args:
        forward: the model.
        batch: the share: inputs and targets.
        job: the run's; it has the objective and the precision.
        parts: equal parts into which the share is cut, computed one after the other; a divisor of
            the number of its samples.
        scaler: multiplies the losses, and so the gradients.

    Returns:
        The mean loss, a scalar, and the sums of the metrics of the share, (k,), on the device.
    """
    objective = job.objective
    losses, sums = [], []
    pieces: Iterable[Batch] = [batch]
    if parts > 1:
        pieces = cut(batch, parts)
    for inputs, targets in pieces:
        with job.autocast():
            outputs = forward(inputs)
        outputs = as_float32(outputs)
        loss = objective.loss(outputs, targets)
        scaler.scale(loss / parts if parts > 1 else loss).backward()
        losses.append(loss.detach())
        sums.append(objective.sums(outputs, targets).detach())
    if parts == 1:
        return losses[0], sums[0]
    return torch.stack(losses).mean(), torch.stack(sums).sum(0)
