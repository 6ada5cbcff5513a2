"""What all phases of a run share: the recipe, the data set, the device, and what a run is asked from outside."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, cycle, groupby, islice

import torch
from torch import Tensor, nn

from swap_hpc.average.state import state_of
from swap_hpc.data import Batches, Dataset, Graph, loader, sampling
from swap_hpc.data.identity import Identity
from swap_hpc.data.loader import View
from swap_hpc.data.sampling import Key, Phase
from swap_hpc.data.seeding import seed_all
from swap_hpc.parallel.devices import Device
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import assign_
from swap_hpc.recipe.schema import LargeBatch, Recipe, Refine
from swap_hpc.train import models
from swap_hpc.train.control import Control
from swap_hpc.train.events import Meeting, SavePoint
from swap_hpc.train.objective import Objective, objective

Batch = tuple[
    Tensor, Tensor
]  # images (n, C, H, W) float32, labels (n,) int64; of a user's own data, inputs and targets (n, ...)


def _nothing_saved(part: str, team: Team) -> SavePoint | None:
    return None


def _square(pixels: int | None) -> tuple[int, int] | None:
    return (pixels, pixels) if pixels else None


@dataclass(frozen=True)
class Job:
    recipe: Recipe
    dataset: Dataset
    device: Device
    control: Control = field(default_factory=Control)
    load: Callable[[str, Team], SavePoint | None] = (
        _nothing_saved  # where a part of the run goes on from; collective over its team
    )
    met: int = 0  # meetings of the groups that are over
    make: Callable[[], nn.Module] | None = (
        None  # the model, where the recipe does not name it; alike at every call
    )
    _evaluations: dict[tuple[int, int], Iterator[Batch]] = field(
        default_factory=dict, init=False
    )  # endless; by rank and size of a team

    @cached_property
    def identity(self) -> Identity:
        """What the data are known by."""
        return Identity.of(self.dataset)

    @property
    def header(self) -> dict[str, str]:
        """What stands in every file of weights: the recipe as TOML, and the data's identity as JSON."""
        return {"recipe": self.recipe.to_toml(), "data": self.identity.to_json()}

    def build(self) -> nn.Module:
        """The recipe's model as its builder makes it, in training mode, on this rank's device. Raises UserError."""
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
        """A model built as `model` was, with its weights, buffers and extra states.

        Unlike a deep copy it has the hooks that the builder registers, on its own parameters, and needs no module that
        can be copied. Raises UserError where the state dict does not fit what the builder makes.
        """
        copy = self.build()
        models.fill_(copy, state_of(model), "that the state dict holds")
        theirs = dict(chain(model.named_parameters(), model.named_buffers()))
        for name, tensor in chain(copy.named_parameters(), copy.named_buffers()):
            if name in theirs:  # also what the state dict leaves out
                assign_(tensor, theirs[name].detach())
        return copy

    @cached_property
    def objective(self) -> Objective:
        """Raises UserError where the recipe's cannot be imported."""
        return objective(self.recipe, len(self.dataset.classes))

    def steps(self, phase: LargeBatch | Refine) -> int:
        """Of an epoch."""
        return len(self.dataset.train) // phase.batch_size

    @property
    def meetings(self) -> list[Meeting]:
        """Of the groups, to be averaged: at the refinement's end, and before it where the recipe asks for it."""
        refine, steps, saves = (
            self.recipe.refine,
            self.steps(self.recipe.refine),
            self.recipe.checkpoint.epochs,
        )
        last = refine.epochs * refine.cycles
        looks = (
            range(refine.evaluate_average, last, refine.evaluate_average)
            if refine.evaluate_average
            else ()
        )
        every = refine.average_every_steps or steps * last

        def saves_at(step: int) -> bool:  # the first one after an epoch at whose end a save is due
            return saves > 0 and step // (steps * saves) > (step - every) // (steps * saves)

        return [
            *(Meeting(epoch * steps, epoch, "look") for epoch in looks),
            *(
                Meeting(step, step // steps, "go_on", saves_at(step))
                for step in range(every, steps * last, every)
            ),
            Meeting(steps * last, last, "end"),
        ]

    def training_batches(
        self, phase: LargeBatch | Refine, key: Key, team: Team, epoch: int = 0, step: int = 0
    ) -> Iterator[Batch]:
        """This rank's share of every step of a phase from a step of an epoch on (both from 0), in one stream per image size."""
        before = self.recipe.large_batch.epochs if key.phase is Phase.REFINE else 0
        for pixels, same in groupby(
            range(epoch, phase.epochs * phase.cycles),
            lambda each: self.recipe.data.size_at(before + each),
        ):
            epochs = list(same)
            span = range(epochs[0], epochs[-1] + 1)
            first = step if span.start == epoch else 0
            picks = sampling.training_picks(
                key, len(self.dataset.train), phase.batch_size, team.rank, team.size, span, first
            )
            view = View(self.recipe.augment, _square(pixels))
            yield from loader.batches(
                self.dataset,
                self.dataset.train,
                picks,
                view,
                phase.batch_size // team.size,
                self.device,
            )

    def test_batches(self, team: Team) -> Iterator[Batch]:
        """This rank's share of the test samples, each of which the team sees once.

        The pipeline is kept for the next evaluation: building one each time would take time, and leave memory in pieces.
        """
        size, place = self.recipe.evaluate.batch_size, (team.rank, team.size)
        picks = list(sampling.evaluation_picks(len(self.dataset.test), size, *place))
        view = View(
            None, _square(self.recipe.data.evaluation_size), self.recipe.data.evaluation_crop
        )
        keeps = not isinstance(self.dataset.test, Batches) or isinstance(self.dataset.test, Graph)
        stream = self._evaluations.pop(place, None)  # an evaluation that is broken off leaves none
        if (
            stream is None
        ):  # a user's function is asked anew each time, for what it may hold in a list
            stream = loader.batches(
                self.dataset,
                self.dataset.test,
                cycle(picks) if keeps else iter(picks),
                view,
                size,
                self.device,
            )
        for number, batch in enumerate(islice(stream, len(picks)) if keeps else stream):
            self.control.beat("an evaluation")
            seed_all(
                Key(self.recipe.seed, Phase.EVALUATION).torch_seed(
                    team.rank + number * team.size, 0
                )
            )
            yield batch
        if keeps:
            self._evaluations[place] = stream

    def batchnorm_batches(self, team: Team) -> Iterator[Tensor]:
        """This rank's share of the images that batch norm is re-estimated on; none after a stop was asked for."""
        size, samples = self.recipe.batchnorm.batch_size, len(self.dataset.train)
        picks = sampling.batchnorm_picks(
            self.recipe.seed,
            samples,
            self.recipe.batchnorm.samples or samples,
            size,
            team.rank,
            team.size,
        )
        batches = loader.batches(
            self.dataset, self.dataset.train, picks, View(self.recipe.augment), size, self.device
        )
        for number, (images, _) in enumerate(batches):
            self.control.beat("the batch-norm refresh")
            if self.control.stop:
                return
            seed_all(
                Key(self.recipe.seed, Phase.BATCHNORM).torch_seed(team.rank + number * team.size, 0)
            )
            yield images

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.torch.type, dtype=torch.bfloat16, enabled=self.recipe.precision == "bf16"
        )
