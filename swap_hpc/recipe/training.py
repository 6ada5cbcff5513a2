"""The fields of a recipe that describe the two phases of training."""

from typing import ClassVar

from pydantic import model_validator

from swap_hpc.recipe.schedule import Schedule, check_schedule, rate_at, rate_until
from swap_hpc.recipe.section import Section
from swap_hpc.recipe.values import Count, CountOrZero, Decay, Fraction
from swap_hpc.recipe.wording import count


class _Phase(Section):
    batch_size: Count
    """Samples per step over all ranks of the phase's team: the world in phase 1, a group in phase
    2."""
    epochs: CountOrZero
    """Epochs: at most this many in phase 1, exactly this many per cycle of the refinement. 0 skips
    the phase, so that any recipe makes a baseline: what else belongs to the phase (of the
    refinement also `groups` and `[batchnorm]`) may stay and has no effect."""
    learning_rate: Schedule
    """Learning rate, evaluated at every step: a constant; `[epoch, value]` knots with linear
    interpolation; or a table of one of the shapes below. Epochs may be shares of the phase's
    `epochs`: `[["0%", 0.0], ["10%", 0.1], ["100%", 0.0]]`."""
    accumulate: Count = 1
    """Parts into which a rank cuts its share of a batch; their gradients are added up. More parts
    need less memory, and batch norm sees smaller batches."""
    ema: Decay | None = None
    """Decay, at each step, of an exponential moving average (EMA) of the weights and of batch
    norm's statistics; 1 - 1/n averages about the last n steps. It begins with the weights at the
    phase's beginning, and is evaluated and saved beside the model, whose training it does not
    change. None: no such average."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> "_Phase":
        if self.epochs:
            check_schedule(self.learning_rate, self.epochs)
        return self

    def rate(self, epoch: float) -> float:
        """Return the learning rate.

        Args:
            epoch: Epochs since the phase, or its cycle, began; fractions are allowed.
        """
        return rate_at(self.learning_rate, epoch, self.epochs)

    def rate_until(self, epoch: float) -> float:
        """Return the learning rate that is reached at `epoch`, before a step of the schedule."""
        return rate_until(self.learning_rate, epoch, self.epochs)


class LargeBatch(_Phase):
    """Phase 1: all ranks train one model, for at most `epochs`."""

    cycles: ClassVar[int] = 1
    average_every_steps: ClassVar[int | None] = None
    stop_accuracy: Fraction | None = None
    """Training accuracy, or whatever the main metric is, at which the phase ends: the mean over an
    epoch's augmented samples. None: it runs for all `epochs`."""
    batchnorm_batch_size: Count | None = None
    """Samples per rank that batch norm must see at once: a rank's share of the batch, divided by
    `accumulate`. A number of ranks that gives another size is refused. None: any is accepted."""


class Refine(_Phase):
    """Phase 2: each group trains its own copy for `epochs` per cycle; 0: plain SGD alone."""

    stop_accuracy: ClassVar[float | None] = None
    cycles: Count = 1
    """Number of cycles. The learning-rate schedule restarts with each, and each adds a group's
    weights at its end to the average."""
    evaluate_average: CountOrZero = 0
    """Epochs between evaluations of the averaged model during the refinement, for which the groups
    wait for each other. 0: only at the end."""
    average_every_steps: Count | None = None
    """Steps between averages of the groups' weights, from which all groups continue, each with its
    own momentum and batch-norm statistics: post-local SGD (Lin et al., arXiv 1808.07217). None: the
    groups are averaged at the end only."""

    @model_validator(mode="after")
    def _one_way_to_average(self) -> "Refine":
        if self.average_every_steps and (self.cycles > 1 or self.evaluate_average):
            raise ValueError(
                "average_every_steps needs one schedule to the end: "
                "set cycles = 1 and evaluate_average = 0"
            )
        return self

    @model_validator(mode="after")
    def _average_is_evaluated(self) -> "Refine":
        last = self.epochs * self.cycles
        if self.epochs and self.evaluate_average > last:
            raise ValueError(
                f"evaluate_average = {self.evaluate_average} has no effect, since the refinement "
                f"ends after {count(last, 'epoch')}: set it lower, or leave it out"
            )
        return self
