"""The phases of SWAP, and the parts of a run that train and save on their own."""

from dataclasses import dataclass
from enum import Enum


class Phase(str, Enum):
    """A phase of SWAP; its value is its name in recipes, files and on the command line."""

    LARGE_BATCH = "large_batch"  # phase 1: all ranks train one model
    REFINE = "refine"  # phase 2: each group trains a copy alone
    AVERAGE = "average"  # phase 3: the copies' weights become one model

    __str__ = str.__str__  # also in f-strings, on every Python


@dataclass(frozen=True)
class Part:
    """A part of a run that one job can do, and that has checkpoints and metrics of its own.

    Phase 1 and phase 3 are one part each; of phase 2, the refinement of each group is a part.
    """

    phase: Phase
    group: int | None = None  # the group that is refined, from 0; None in phases 1 and 3

    @property
    def name(self) -> str:
        """The name of the part in the names of files: `large_batch`, `group-003` or `average`."""
        return self.phase.value if self.group is None else f"group-{self.group:03d}"

    def __str__(self) -> str:
        return self.phase.value if self.group is None else f"group {self.group}"


PHASE_1 = Part(Phase.LARGE_BATCH)


def refinement_of(group: int) -> Part:
    """Return the part of a run that refines a group."""
    return Part(Phase.REFINE, group)
