"""The seconds of a recipe's phases on any number of ranks, from the costs of a machine.

The model:

- The ranks share the samples of a step. A rank takes `sample` seconds for each of its samples, and
  `step` seconds for the rest of a step. Where its share outgrows the caches, between `small` and
  `large` samples, each doubling of the share adds `growth` seconds to each sample.
- Ranks beyond the `cores` of a host share them.
- A message takes `latency` seconds, and its bytes what `bandwidth` makes of them. An allreduce over
  N ranks is 2 (N - 1) messages of 1 / N of the bytes (a ring), or 2 log2 N messages of all bytes (a
  tree), whichever takes less time.
- Saves go to one file system, which writes `disk` bytes per second in all.

Evaluations are left out, and so are averages on the way that are only evaluated.
"""

import math
from dataclasses import dataclass

from swap_hpc.recipe.schema import Recipe
from swap_hpc.recipe.training import LargeBatch, Refine

# Bytes of a number: gradients are sent as float32, sums of weights as float64.
GRADIENT, SUM = 4, 8

# A forward pass alone, as a share of forward and backward pass: the backward pass takes twice as
# many operations.
FORWARD = 1 / 3


@dataclass(frozen=True)
class Costs:
    """The costs of a machine, in seconds, bytes, and bytes per second."""

    sample: float  # forward and backward pass of one sample by one rank
    step: float  # a step without its samples: the optimizer, launches
    growth: float = 0.0  # added to each sample with each doubling of a rank's share of a step ...
    small: float = 128.0  # ... beyond this number of samples
    large: float = 1024.0  # ... up to this number
    latency: float = 20e-6  # of a message
    bandwidth: float = 10e9  # of a rank's messages
    disk: float = 1e9  # of the file system, all ranks together
    cores: float | None = None  # of the one host that all ranks share; None: each rank has its own

    def allreduce(self, size: float, ranks: int) -> float:
        """Return the seconds of an allreduce of `size` bytes over `ranks` ranks."""
        kinds = (ring_messages(size, ranks), tree_messages(size, ranks))
        return min(messages * self.latency + sent / self.bandwidth for messages, sent in kinds)

    def compute(self, samples: float, steps: float, ranks: int) -> float:
        """Return the seconds that a rank computes while all ranks of the job do.

        Args:
            samples: of this rank, in all its steps.
            steps: of this rank; 0 for samples outside of training steps.
            ranks: of the job.
        """
        ranks_per_core = max(1.0, ranks / self.cores) if self.cores else 1.0
        share = samples / steps if steps else 0
        alone = samples * self.per_sample(share) + steps * self.step
        return alone * ranks_per_core

    def per_sample(self, share: float) -> float:
        """Return the seconds of a sample in a step of which a rank has `share` samples."""
        within = min(max(share, self.small), self.large)
        return self.sample + self.growth * math.log2(within / self.small)


def ring_messages(size: float, ranks: int) -> tuple[float, float]:
    """Return the messages, one after the other, of an allreduce by a ring, and their bytes."""
    messages = 2 * (ranks - 1)
    return messages, messages * size / ranks


def tree_messages(size: float, ranks: int) -> tuple[float, float]:
    """Return the messages, one after the other, of an allreduce by a tree, and their bytes."""
    messages = 2 * math.ceil(math.log2(ranks))
    return messages, messages * size


@dataclass(frozen=True)
class Work:
    """What a run has to do, whatever machine does it."""

    recipe: Recipe
    samples: int  # for training
    parameters: int


def predict(work: Work, costs: Costs, ranks: int) -> dict[str, float]:
    """Return the seconds of each phase of a run on `ranks` ranks, and of its saves."""
    recipe, size = work.recipe, work.parameters
    first = epoch_seconds(work, costs, recipe.large_batch, ranks, ranks)
    second = epoch_seconds(work, costs, recipe.refine, _ranks_per_group(recipe, ranks), ranks)
    groups_in_turn = max(1, recipe.groups // ranks)
    refine_epochs = recipe.refine.epochs * recipe.refine.cycles
    average = batchnorm = averages_on_the_way = 0.0
    if refine_epochs:  # otherwise it is plain SGD, without an average
        average = costs.allreduce(SUM * size, min(ranks, recipe.groups))
        if recipe.refine.average_every_steps:  # post-local SGD
            steps = refine_epochs * (work.samples // recipe.refine.batch_size)
            # The one after the last step is the average that every run ends with.
            on_the_way = max(0, steps - 1) // recipe.refine.average_every_steps
            averages_on_the_way = average * on_the_way
        batchnorm = costs.compute(_batchnorm_samples(work, ranks) * FORWARD, 0, ranks)
    # Groups save at the same time, and share the file system.
    saves = recipe.checkpoint.saves(recipe.large_batch.epochs, first)
    saves += recipe.checkpoint.saves(refine_epochs, second) * recipe.groups
    save = 2 * GRADIENT * size / costs.disk  # the weights and the momentum
    return {
        "large_batch": recipe.large_batch.epochs * first,
        "refine": refine_epochs * groups_in_turn * second + averages_on_the_way,
        "average": average,
        "batchnorm": batchnorm,
        "save": save * saves,
    }


def _batchnorm_samples(work: Work, ranks: int) -> int:
    """Return the images of the batch-norm refresh that the busiest rank takes, in whole batches."""
    settings = work.recipe.batchnorm
    batches = (settings.samples or work.samples) // settings.batch_size
    return math.ceil(batches / ranks) * settings.batch_size


def _ranks_per_group(recipe: Recipe, ranks: int) -> int:
    return max(1, ranks // recipe.groups)


def epoch_seconds(
    work: Work, costs: Costs, phase: LargeBatch | Refine, team: int, ranks: int
) -> float:
    """Return the seconds of one epoch of a phase.

    Args:
        work: the run.
        costs: of the machine.
        phase: a section of the recipe.
        team: the ranks that train one model together.
        ranks: all ranks of the job, which train at the same time.
    """
    steps = work.samples // phase.batch_size
    computing = costs.compute(steps * phase.batch_size / team, steps, ranks)
    return computing + communication_seconds(work, costs, phase, team)


def communication_seconds(work: Work, costs: Costs, phase: LargeBatch | Refine, team: int) -> float:
    """Return the seconds in which a team averages the gradients of one epoch of a phase."""
    steps = work.samples // phase.batch_size
    return steps * costs.allreduce(GRADIENT * work.parameters, team)


def team_size(recipe: Recipe, phase: str, ranks: int) -> int:
    """Return the ranks that train one model in a phase, "large_batch" or "refine"."""
    return ranks if phase == "large_batch" else _ranks_per_group(recipe, ranks)


def bytes_per_image(work: Work, ranks: int) -> dict[str, float]:
    """Return the bytes that a rank sends for each image that its team trains on, by phase."""
    recipe = work.recipe
    batch_sizes = {
        "large_batch": recipe.large_batch.batch_size,
        "refine": recipe.refine.batch_size,
    }
    sent = {}
    for phase, batch_size in batch_sizes.items():
        team = team_size(recipe, phase, ranks)
        # A ring of N ranks sends each byte 2 (N - 1) / N times.
        sent[phase] = 2 * (team - 1) / team * GRADIENT * work.parameters / batch_size
    return sent


def baselines(recipe: Recipe) -> dict[str, Recipe]:
    """Return SWAP's recipe, and those of plain SGD with its small and with its large batches.

    Plain SGD takes as many epochs as a model of SWAP sees. The keys name the method.
    """
    first, refine = recipe.large_batch, recipe.refine
    epochs = first.epochs + refine.epochs * refine.cycles
    no_refinement = refine.model_copy(update={"epochs": 0})
    plain = recipe.model_copy(update={"refine": no_refinement, "groups": 1})
    recipes = {}
    for name, size in (("small batch", refine.batch_size), ("large batch", first.batch_size)):
        # The recipe's share of a batch for batch norm is that of its own batch size.
        fields = {"epochs": epochs, "batch_size": size, "batchnorm_batch_size": None}
        phase = first.model_copy(update=fields)
        recipes[f"{name} ({size:,})"] = plain.model_copy(update={"large_batch": phase})
    return recipes | {"SWAP": recipe}
