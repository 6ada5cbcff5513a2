"""What training yields: epochs to report, save points to resume from, and the ends of phases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

from torch import Tensor, nn

from swap_hpc.average.uniform import WeightSum
from swap_hpc.parallel.devices import Memory
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import Part
from swap_hpc.train.updates import NO_UPDATES, Read, Updates

if TYPE_CHECKING:  # a training loop of the user's own needs no DALI
    from swap_hpc.data.dataset import SplitName


@dataclass(frozen=True)
class Evaluation:
    """Means over samples."""

    loss: float
    metrics: Mapping[str, float]  # by name; the first one is the main one
    # of the metrics that have them, the figure of each class, None for one without a sample
    by_class: Mapping[str, list[float | None]] = field(default_factory=dict)

    @property
    def main(self) -> float:
        """The main metric."""
        return next(iter(self.metrics.values()))

    @property
    def accuracy(self) -> float:
        """The share of right answers, in [0, 1]; KeyError where another metric was measured."""
        return self.metrics["accuracy"]


@dataclass(frozen=True)
class Epoch:
    """One epoch of a part of the run. Its numbers are the same on all ranks of the part's team."""

    part: Part
    cycle: int  # from 1
    epoch: int  # from 1, since the phase began, over all its cycles
    learning_rate: float  # at the epoch's end
    train: Evaluation  # running means over augmented batches, each taken before its step
    # None where `evaluate.every` skips it; where there is a validation split, inside of cycles, too
    test: Evaluation | None
    images: int  # trained on by the whole team
    train_seconds: float  # of the slowest rank, with data loading
    evaluate_seconds: float
    peak_memory: Memory  # the largest of any rank's process since it began
    ends_cycle: bool
    updates: Updates = NO_UPDATES  # clipped and skipped steps
    validation: Evaluation | None = None  # None where it is skipped, or there is no such split
    # Of the moving average of the weights, on the same splits as the model; empty without one.
    ema: "Mapping[SplitName, Evaluation]" = field(default_factory=dict)


@dataclass(frozen=True)
class Running:
    """One rank's sums over the steps of an epoch so far."""

    loss: float = 0.0  # summed over samples
    sums: tuple[float, ...] = ()  # of the metrics, over samples; empty before the first step
    samples: int = 0
    seconds: float = 0.0  # of training
    updates: Updates = NO_UPDATES

    def after(self, update: Read) -> "Running":
        """Return these sums with what the update of a step tells."""
        return replace(self, updates=self.updates.plus(update))

    def plus(self, loss: float, sums: Sequence[float], samples: int) -> "Running":
        """Return these sums with those of one more step.

        Steps are added one by one, so that the sums do not depend on when they are checked.
        """
        total = tuple(map(sum, zip_longest(self.sums, sums, fillvalue=0.0)))
        return replace(self, loss=self.loss + loss, sums=total, samples=self.samples + samples)


class Position(NamedTuple):
    """A step boundary of a phase. Positions are ordered as training passes them."""

    epoch: int  # whole epochs done since the phase began, over all its cycles
    step: int  # steps done of the next epoch


@dataclass(frozen=True)
class SavePoint:
    """A step boundary, and all that a part of the run needs to resume there, to the bit.

    Its tensors are the live ones of the model and the optimizer: save them at once.
    """

    part: Part
    at: Position
    ended: bool  # the part is over
    due: bool  # to be saved; otherwise the point only says where the part stands
    weights: dict[str, Tensor]  # from the state dict; the same on all ranks of the team
    buffers: dict[str, Tensor]  # from the state dict, with extra states; this rank's own
    # The state of the optimizer, and of the loss scale in fp16: a tree, see `train.state`.
    training: dict[str, Any]
    cycle_sum: WeightSum = field(
        default_factory=WeightSum
    )  # of weights at the ends of cycles so far
    running: Running = field(default_factory=Running)  # this rank's, of the epoch begun
    # The buffers whose mean over the ranks another number of ranks resumes from; it takes the
    # first rank's for all other buffers.
    means: tuple[str, ...] = ()
    # The moving averages of weights and buffers, where the recipe asks for them.
    ema_weights: dict[str, Tensor] = field(default_factory=dict)  # the same on all ranks
    ema_buffers: dict[str, Tensor] = field(default_factory=dict)  # this rank's own

    @property
    def ema_state(self) -> dict[str, Tensor]:
        """The state dict of the moving average; what is not averaged is the model's."""
        state = self.weights | self.buffers
        averages = self.ema_weights | self.ema_buffers
        return state | {name: t.to(state[name].dtype) for name, t in averages.items()}


class Saves(Protocol):
    """Where the parts of a run resume from."""

    @property
    def synced(self) -> int:
        """The number of sync points that the groups have passed."""

    def load(self, part: Part, team: Team) -> SavePoint | None:
        """Return the save point that a part resumes from, None where it begins anew.

        Collective over `team`.
        """


class NoSaves:
    """A run from its beginning."""

    synced = 0

    def load(self, part: Part, team: Team) -> SavePoint | None:
        return None


FROM_THE_BEGINNING = NoSaves()


@dataclass(frozen=True)
class SyncPoint:
    """A step of the refinement at which the groups' weights are averaged."""

    step: int  # steps done since the refinement began
    epoch: int  # whole epochs done since then
    # "evaluate" the average while the groups go on from their own weights; "continue" from the
    # average (post-local SGD); or "end" the refinement
    then: Literal["evaluate", "continue", "end"]
    save_is_due: bool = False  # of the groups, where they continue from the average


@dataclass(frozen=True)
class LargeBatchEnded:
    """Phase 1 is over."""

    model: nn.Module


@dataclass(frozen=True)
class GroupArrived:
    """A group's copy has reached a sync point."""

    part: Part
    model: nn.Module
    sync: SyncPoint


@dataclass(frozen=True)
class GroupsArrived:
    """All groups of this rank have reached a sync point."""

    sync: SyncPoint


@dataclass(frozen=True)
class Averaged:
    """The model holds the average of the groups' weights; its batch norm is still one group's."""

    model: nn.Module
    sync: SyncPoint


@dataclass(frozen=True)
class Continued:
    """The groups of this rank hold the average and go on from it."""

    sync: SyncPoint


@dataclass(frozen=True)
class Refreshed:
    """The averaged model has batch-norm statistics of its own."""

    model: nn.Module
    sync: SyncPoint


Event: TypeAlias = (
    Epoch
    | SavePoint
    | LargeBatchEnded
    | GroupArrived
    | GroupsArrived
    | Averaged
    | Continued
    | Refreshed
)
