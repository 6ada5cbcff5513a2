"""`Job`: what all phases of a run share, and the batches that they take."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, cycle, groupby, islice
from typing import Any

import torch
from torch import nn

from swap_hpc.average.batchnorm import refresh_batchnorm_
from swap_hpc.average.state import state_of
from swap_hpc.data import Batches, Dataset, Graph, loader, sampling
from swap_hpc.data.dataset import SplitName
from swap_hpc.data.identity import Identity
from swap_hpc.data.loader import Batch, View
from swap_hpc.data.places import streams_of
from swap_hpc.data.sampling import EVALUATION, Key
from swap_hpc.data.seeding import seed_all
from swap_hpc.parallel.devices import Device
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import assign_
from swap_hpc.recipe.phase import Part, Phase
from swap_hpc.recipe.schema import Recipe
from swap_hpc.recipe.training import LargeBatch, Refine
from swap_hpc.train import models
from swap_hpc.train.control import Control
from swap_hpc.train.events import SyncPoint
from swap_hpc.train.objective import Objective, objective
from swap_hpc.train.precision import autocast


def _square(pixels: int | None) -> tuple[int, int] | None:
    return (pixels, pixels) if pixels else None


@dataclass(frozen=True)
class Job:
    """What the phases of a run share.

    Attributes:
        recipe: what to run.
        dataset: the data.
        device: this rank's.
        control: what this rank is asked from outside, and its heartbeat.
        make: builds the model, where the recipe does not name it; every call builds it alike.
    """

    recipe: Recipe
    dataset: Dataset
    device: Device
    control: Control = field(default_factory=Control)
    make: Callable[[], nn.Module] | None = None
    # endless streams of evaluation batches, by split, and by rank and size of the team
    _evaluations: dict[tuple[SplitName, int, int], Iterator[Batch]] = field(
        default_factory=dict, init=False
    )

    @cached_property
    def identity(self) -> Identity:
        """What tells the data apart from other data."""
        return Identity.of(self.dataset)

    @property
    def header(self) -> dict[str, str]:
        """The header of every file of weights: the recipe as TOML, the data's identity as JSON."""
        return {"recipe": self.recipe.to_toml(), "data": self.identity.to_json()}

    def build(self) -> nn.Module:
        """Build the recipe's model, in training mode, on this rank's device.

        Raises:
            UserError: the model cannot be built.
        """
        if self.make:
            built = self.make()
        else:
            built = models.build(
                self.recipe.model,
                len(self.dataset.classes),
                self.dataset.channels,
                self.recipe.seed,
            )
        built = built.train().to(self.device.torch)
        return built.to(memory_format=torch.channels_last) if self.recipe.channels_last else built

    def copy_of(self, model: nn.Module) -> nn.Module:
        """Build a model like `model`, and give it the weights, buffers and extra states of `model`.

        Unlike a deep copy it has the hooks that the builder registers, on its own parameters, and
        it works for modules that cannot be copied.

        Raises:
            UserError: the state dict does not fit what the builder makes.
        """
        copy = self.build()
        models.fill_(copy, state_of(model), "that the state dict holds")
        theirs = dict(chain(model.named_parameters(), model.named_buffers()))
        for name, tensor in chain(copy.named_parameters(), copy.named_buffers()):
            if name in theirs:
                # also what the state dict leaves out
                assign_(tensor, theirs[name].detach())
        return copy

    @cached_property
    def objective(self) -> Objective:
        """The loss and the score of the recipe.

        Raises:
            UserError: they cannot be imported.
        """
        return objective(self.recipe, len(self.dataset.classes))

    def settings(self, part: Part) -> LargeBatch | Refine:
        """Return the section of the recipe that a part of the run is trained by."""
        if part.phase is Phase.LARGE_BATCH:
            return self.recipe.large_batch
        return self.recipe.refine

    def steps(self, settings: LargeBatch | Refine) -> int:
        """Return the steps per epoch of a phase; the last partial batch is dropped."""
        return len(self.dataset.train) // settings.batch_size

    @property
    def sync_points(self) -> list[SyncPoint]:
        """The steps of the refinement at which the groups' weights are averaged.

        The last one is the end of the refinement; a recipe may ask for others before it.
        """
        refine = self.recipe.refine
        steps, last = self.steps(refine), refine.epochs * refine.cycles
        end = SyncPoint(steps * last, last, "end")
        if every := refine.evaluate_average:
            epochs = range(every, last, every)
            return [*(SyncPoint(epoch * steps, epoch, "evaluate") for epoch in epochs), end]
        if every := refine.average_every_steps or 0:
            return [
                *(
                    SyncPoint(step, step // steps, "continue", self._saves_at(step, every))
                    for step in range(every, end.step, every)
                ),
                end,
            ]
        return [end]

    def _saves_at(self, step: int, every: int) -> bool:
        """Tell whether the groups save at a sync point.

        They do at the first one after an epoch at whose end a save is due.
        """
        steps = self.steps(self.recipe.refine) * self.recipe.checkpoint.epochs
        return steps > 0 and step // steps > (step - every) // steps

    def training_batches(
        self, settings: LargeBatch | Refine, key: Key, team: Team, epoch: int = 0, step: int = 0
    ) -> Iterator[Batch]:
        """Yield this rank's share of every step of a phase, from a step of an epoch on.

        Args:
            settings: the section of the recipe.
            key: of the random draws.
            team: the ranks that share a batch.
            epoch: where to begin, from 0.
            step: the step of that epoch, from 0.
        """
        before = self.recipe.large_batch.epochs if key.phase is Phase.REFINE else 0
        last = settings.epochs * settings.cycles
        share = settings.batch_size // team.size

        def size_at(each: int) -> int | None:
            return self.recipe.data.size_at(before + each)

        # one stream for each image size
        for pixels, same in groupby(range(epoch, last), size_at):
            epochs = list(same)
            span = range(epochs[0], epochs[-1] + 1)
            picks = sampling.training_picks(
                key,
                len(self.dataset.train),
                settings.batch_size,
                team.rank,
                team.size,
                span,
                step if span.start == epoch else 0,
                streams_of(self.recipe.augment),
            )
            view = View(self.recipe.augment, _square(pixels))
            train = self.dataset.train
            yield from loader.batches(self.dataset, train, picks, view, share, self.device)

    def test_batches(self, team: Team, name: SplitName = "test") -> Iterator[Batch]:
        """Yield this rank's share of the samples of a split, each of which the team sees once.

        The pipeline is kept for the next evaluation: building it takes time, and building it again
        and again leaves memory in pieces.
        """
        size, place = self.recipe.evaluate.batch_size, (name, team.rank, team.size)
        test, data = self.dataset.splits[name], self.recipe.data
        picks = list(sampling.evaluation_picks(len(test), size, team.rank, team.size))
        view = View(None, _square(data.evaluation_size), data.evaluation_crop)
        # A user's function is called anew each time: it may hold its batches in a list.
        keeps = not isinstance(test, Batches) or isinstance(test, Graph)
        stream = self._evaluations.pop(place, None)  # none after an evaluation that broke off
        if stream is None:
            endless = cycle(picks) if keeps else iter(picks)
            stream = loader.batches(self.dataset, test, endless, view, size, self.device)
        key = Key(self.recipe.seed, EVALUATION)
        for number, batch in enumerate(islice(stream, len(picks)) if keeps else stream):
            self.control.heartbeat("an evaluation")
            seed_all(key.torch_seed(team.rank + number * team.size, 0))
            yield batch
        if keeps:
            self._evaluations[place] = stream

    def batchnorm_batches(self, team: Team) -> Iterator[Any]:
        """Yield this rank's share of the inputs from which batch norm is re-estimated.

        It ends early where this rank is asked to stop.
        """
        train, settings = self.dataset.train, self.recipe.batchnorm
        use = settings.samples or len(train)
        picks = sampling.batchnorm_picks(
            self.recipe.seed,
            len(train),
            use,
            settings.batch_size,
            team.rank,
            team.size,
            streams_of(self.recipe.augment),
        )
        view = View(self.recipe.augment)
        batches = loader.batches(self.dataset, train, picks, view, settings.batch_size, self.device)
        key = Key(self.recipe.seed, Phase.AVERAGE)
        for number, (inputs, _) in enumerate(batches):
            self.control.heartbeat("the batch-norm refresh")
            if self.control.stop:
                return
            seed_all(key.torch_seed(team.rank + number * team.size, 0))
            yield inputs

    def refresh_batchnorm_(self, model: nn.Module, team: Team) -> None:
        """Re-estimate the batch-norm statistics of `model`, as the recipe says; collective."""
        with self.autocast():
            refresh_batchnorm_(model, self.batchnorm_batches(team), team)

    def autocast(self) -> torch.autocast:
        """Return the context of forward passes, in the recipe's precision."""
        return autocast(self.recipe.precision, self.device.torch)
