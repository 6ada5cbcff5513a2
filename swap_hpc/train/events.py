"""What training yields: `Epoch`s to tell of, and `SavePoint`s to go on from."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor, nn

from swap_hpc.average.uniform import WeightSum
from swap_hpc.parallel.devices import Memory

PhaseName = Literal["large_batch", "refine"]


@dataclass(frozen=True)
class Evaluation:
    """Means over samples."""

    loss: float
    accuracy: float  # in [0, 1]


@dataclass(frozen=True)
class Epoch:
    """One epoch of a phase, as all ranks of its team see it."""

    phase: PhaseName
    group: int | None
    cycle: int  # from 1
    epoch: int  # from 1, since the phase began
    learning_rate: float  # at the epoch's end
    train: Evaluation  # running: of augmented batches, each before its step
    test: Evaluation | None  # None where `evaluate.every` skips it
    images: int  # the team's
    train_seconds: float  # data loading in; the slowest rank's
    evaluate_seconds: float
    peak_memory: Memory  # the most that any rank's process has had since it began
    ends_cycle: bool


@dataclass(frozen=True)
class Running:
    """One rank's sums over the steps of an epoch so far."""

    loss: float = 0.0  # over samples
    correct: float = 0  # the sum of the scores: whole numbers, where they are hits
    samples: int = 0
    seconds: float = 0.0  # of training

    def to(self, loss: float, correct: float, samples: int) -> "Running":
        """These sums and one more step's. Added up step by step, so that they do not depend on when somebody looked."""
        return Running(
            self.loss + loss, self.correct + correct, self.samples + samples, self.seconds
        )


@dataclass(frozen=True)
class SavePoint:
    """A step boundary, and all that a phase goes on from there, to the bit. Its tensors are the live ones: save them at once."""

    phase: PhaseName
    group: int | None
    epoch: int  # whole epochs done since the phase began, over all its cycles
    step: int  # steps done of the next one
    ended: bool  # the phase is over
    due: bool  # to be saved; else it only says where the phase stands
    weights: dict[str, Tensor]  # of the state dict, alike on all ranks of the team
    buffers: dict[
        str, Tensor
    ]  # of the state dict, and extra states; this rank's own: batch norm has seen its share of the batches
    momentum: dict[str, Tensor]  # by parameter, where it has been stepped
    cycles: WeightSum = field(
        default_factory=WeightSum
    )  # the weights at the ends of the cycles so far
    running: Running = field(default_factory=Running)  # of the epoch begun, this rank's
    means: tuple[
        str, ...
    ] = ()  # the buffers of which another number of ranks goes on from the mean; of others, from the first rank's

    @property
    def name(self) -> str:
        return part_name(self.group)


@dataclass(frozen=True)
class Meeting:
    """Where in the refinement the groups' weights are averaged."""

    step: int  # steps done since the refinement began
    epoch: int  # whole epochs done
    then: Literal[
        "go_on", "look", "end"
    ]  # go on from the average; look at the average, go on alone; end
    saves: bool = False  # the groups' save is due, where they go on from the average


@dataclass(frozen=True)
class Done:
    """A part of the run is done: its name, and the model as it left it."""

    what: str  # "large_batch", "group-000" ..., "refine" (all of this rank's groups), "average", "go_on", "batchnorm"
    model: nn.Module
    meeting: Meeting | None = None  # of the refinement


Event: TypeAlias = Epoch | SavePoint | Done


def part_name(group: int | None) -> str:
    """What files call a part of the run: phase 1 (None), or a group's refinement."""
    return "large_batch" if group is None else f"group-{group:03d}"
