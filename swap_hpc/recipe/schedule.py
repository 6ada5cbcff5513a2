"""The learning rate as a pure function of the epoch: between knots, or of a named shape."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from swap_hpc.recipe.section import Section
from swap_hpc.recipe.values import constant_as_pairs


def _number_or_share(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and value >= 0:
        return float(value)
    is_share = isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?%", value)
    if is_share and float(value[:-1]) <= 100:
        return value
    raise ValueError('needs finite epochs of at least 0, or a share of the phase: "10%"')


# A time since the phase began: epochs, or a share of the phase's epochs, "10%".
Position: TypeAlias = float | str
CheckedPosition = Annotated[Position, BeforeValidator(_number_or_share)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Knots: TypeAlias = tuple[tuple[CheckedPosition, Rate], ...]


def in_epochs(position: Position, epochs: int) -> float:
    """Return a position in epochs, in a phase of `epochs`.

    >>> in_epochs("10%", 30)
    3.0
    """
    return float(position[:-1]) * epochs / 100 if isinstance(position, str) else position


def interpolate(knots: Sequence[tuple[float, float]], epoch: float) -> float:
    """Return the value at `epoch`: linear between knots, constant outside them.

    Args:
        knots: (epoch, value) pairs, epochs ascending.
        epoch: Epochs since the schedule began; fractions are allowed.

    >>> interpolate(((0, 0.0), (2, 1.0), (4, 0.0)), 3.0)
    0.5
    """
    if epoch <= knots[0][0]:
        return knots[0][1]
    for (left, low), (right, high) in pairwise(knots):
        if epoch <= right:
            value = low + (high - low) * (epoch - left) / (right - left)
            return max(0.0, value)  # rounding may give -1e-17 beside a zero
    return knots[-1][1]


SHARES_FIT = 'a share, such as "10%", fits any length'
ROUNDING = 1e-9  # epochs by which a computed time may be off


class _Shape(Section):
    """A linear warm-up from `start` to `peak`, and what follows."""

    peak: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Learning rate at the end of the warm-up, the highest."""
    warmup: CheckedPosition = 0.0
    """Length of the linear warm-up: epochs, or a share of the phase, `"10%"`; 0: none."""
    start: Rate = 0.0
    """Learning rate at the beginning of the warm-up."""

    @model_validator(mode="after")
    def _rates_fit_together(self) -> "_Shape":
        if self.start and not in_epochs(self.warmup, 1):
            raise ValueError(f"start = {self.start:g} belongs to a warm-up: set warmup, too")
        if max(self.start, self._end) > self.peak:
            raise ValueError("peak is the highest rate: start and end are at most as high")
        return self

    @property
    def _end(self) -> float:
        return 0.0

    def rate(self, epoch: float, epochs: int) -> float:
        """Return the learning rate.

        Args:
            epoch: Epochs since the phase, or its cycle, began; fractions are allowed.
            epochs: Length of the phase, or of a cycle.
        """
        begin = in_epochs(self.warmup, epochs)
        if epoch < begin:
            return self.start + (self.peak - self.start) * epoch / begin
        return self._rate_after_warmup(epoch, begin, epochs)

    def _rate_after_warmup(self, epoch: float, begin: float, epochs: int) -> float:
        raise NotImplementedError

    def check(self, epochs: int) -> None:
        """Check that the shape fits into a phase of `epochs`; ValueError if it does not."""
        if in_epochs(self.warmup, epochs) >= epochs:
            hint = "give a smaller share" if isinstance(self.warmup, str) else SHARES_FIT
            raise ValueError(
                f"learning_rate.warmup = {self.warmup} lasts for all of the phase's "
                f"epochs = {epochs}: {hint}"
            )


class Constant(_Shape):
    """`peak` until the end."""

    shape: Literal["constant"]

    def _rate_after_warmup(self, epoch: float, begin: float, epochs: int) -> float:
        return self.peak


class _Decay(_Shape):
    end: Rate = 0.0
    """Learning rate at the end of the phase."""

    @property
    def _end(self) -> float:
        return self.end

    def _rate_after_warmup(self, epoch: float, begin: float, epochs: int) -> float:
        done = min(1.0, (epoch - begin) / (epochs - begin))
        return self.end + (self.peak - self.end) * self._share_left(done)

    def _share_left(self, done: float) -> float:
        """Return the share of the way from `end` to `peak`, after a share of the decay's time."""
        raise NotImplementedError


class Linear(_Decay):
    """A straight line from `peak` to `end`."""

    shape: Literal["linear"]

    def _share_left(self, done: float) -> float:
        return 1 - done


class Cosine(_Decay):
    """Half a cosine wave from `peak` to `end` (Loshchilov and Hutter, arXiv 1608.03983)."""

    shape: Literal["cosine"]

    def _share_left(self, done: float) -> float:
        return (1 + math.cos(math.pi * done)) / 2


class Step(_Shape):
    """`peak`, multiplied by `factor` at each of the times in `at`."""

    shape: Literal["step"]
    at: Annotated[tuple[CheckedPosition, ...], Field(min_length=1)]
    """Times of the steps, ascending: epochs, or shares of the phase, `"50%"`."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor of each step."""

    def _rate_after_warmup(self, epoch: float, begin: float, epochs: int) -> float:
        steps = sum(epoch >= in_epochs(position, epochs) - ROUNDING for position in self.at)
        return float(self.peak * self.factor**steps)

    def check(self, epochs: int) -> None:
        super().check(epochs)
        times = [in_epochs(position, epochs) for position in (self.warmup, *self.at)]
        if any(left >= right for left, right in pairwise((*times, epochs))):
            raise ValueError(
                "learning_rate.at needs ascending times between the end of the warm-up and that "
                f'of the phase (epochs = {epochs}): shares, such as "50%", fit any length'
            )


def _tag(value: Any) -> str | None:
    """Return the tag of a schedule; None for a table of no known shape."""
    if isinstance(value, Section):
        return f"<{type(value).__name__}>"
    if not isinstance(value, dict):
        return "<Knots>"
    shape = value.get("shape")
    known = ("constant", "linear", "cosine", "step")
    return f"<{shape.title()}>" if isinstance(shape, str) and shape in known else None


_FORMS = "a number, or pairs from an epoch on: [[0, 0.1], [8, 0.0]]"


def _as_pairs(value: Any) -> Any:
    try:
        return constant_as_pairs(value)
    except ValueError:
        raise ValueError(f"needs {_FORMS}, or a table with a shape") from None


def _checked_knots(knots: Knots) -> Knots:
    if not knots:
        raise ValueError("needs at least one [epoch, value] pair")
    # positions of both kinds compare only where the length of the phase is known
    if len({type(position) for position, _ in knots}) == 1:
        check_knots(knots, 1)
    return knots


def check_knots(knots: Knots, epochs: int) -> None:
    """Check that knots ascend in a phase of `epochs`; ValueError if they do not."""
    times = [in_epochs(position, epochs) for position, _ in knots]
    if any(left >= right for left, right in pairwise(times)):
        raise ValueError("needs [epoch, value] pairs in ascending order of their epochs")


Schedule = Annotated[
    Annotated[Knots, BeforeValidator(_as_pairs), AfterValidator(_checked_knots), Tag("<Knots>")]
    | Annotated[Constant, Tag("<Constant>")]
    | Annotated[Linear, Tag("<Linear>")]
    | Annotated[Cosine, Tag("<Cosine>")]
    | Annotated[Step, Tag("<Step>")],
    Discriminator(
        _tag,
        custom_error_type="schedule",
        custom_error_message=(
            f'needs {_FORMS}, or a table: {{ shape = "cosine", peak = 0.1, warmup = "10%" }}; '
            "shapes: constant, linear, cosine, step"
        ),
    ),
]


def check_schedule(schedule: Schedule, epochs: int) -> None:
    """Check that a schedule fits into a phase of `epochs`; ValueError if it does not."""
    if isinstance(schedule, tuple):
        try:
            check_knots(schedule, epochs)
        except ValueError as error:
            raise ValueError(f"learning_rate {error}") from None
    else:
        schedule.check(epochs)


def is_constant(schedule: Schedule) -> bool:
    """Tell whether a schedule has one value at all times."""
    if isinstance(schedule, tuple):
        return len({value for _, value in schedule}) == 1
    return isinstance(schedule, Constant) and not in_epochs(schedule.warmup, 1)


def rate_at(schedule: Schedule, epoch: float, epochs: int) -> float:
    """Return the learning rate of a schedule.

    Args:
        schedule: Knots, or a shape.
        epoch: Epochs since the phase, or its cycle, began; fractions are allowed.
        epochs: Length of the phase, or of a cycle.
    """
    if isinstance(schedule, tuple):
        knots = [(in_epochs(position, epochs), value) for position, value in schedule]
        return interpolate(knots, epoch)
    return schedule.rate(epoch, epochs)


def rate_until(schedule: Schedule, epoch: float, epochs: int) -> float:
    """Return what `rate_at` does, but where the rate falls at this time, the one before."""
    is_after_warmup = isinstance(schedule, Step) and epoch > in_epochs(schedule.warmup, epochs)
    return rate_at(schedule, epoch - 2 * ROUNDING if is_after_warmup else epoch, epochs)
