"""`fit()`, one phase's training as a generator of epochs, and `evaluate()`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swap_hpc.averaging import average_running_statistics_, broadcast_weights_
from swap_hpc.data import Dataset, loader, sampling
from swap_hpc.data.sampling import Key
from swap_hpc.devices import Device
from swap_hpc.errors import RunError
from swap_hpc.gradients import averaged_gradients
from swap_hpc.ranks import Team
from swap_hpc.recipe import LargeBatch, Recipe, Refine
from swap_hpc.schedule import interpolate

CHECK_EVERY = 50  # steps between looks at the losses: looking makes the host wait for the device

Batch = tuple[Tensor, Tensor]  # images (n, C, H, W) float32, labels (n,) int64


@dataclass(frozen=True)
class Evaluation:
    """Means over samples."""

    loss: float
    accuracy: float  # in [0, 1]


@dataclass(frozen=True)
class Epoch:
    """One epoch of a phase, as all ranks of its team see it."""

    phase: Literal["large_batch", "refine"]
    group: int | None
    cycle: int  # from 1
    epoch: int  # from 1, since the phase began
    learning_rate: float  # at the epoch's end
    train: Evaluation  # running: of augmented batches, each before its step
    test: Evaluation | None  # None where `evaluate.every` skips it
    images: int  # the team's
    train_seconds: float  # data loading in; the slowest rank's
    evaluate_seconds: float
    ends_cycle: bool


@dataclass(frozen=True)
class Job:
    """What all phases of a run share."""

    recipe: Recipe
    dataset: Dataset
    device: Device

    def training_batches(self, phase: LargeBatch | Refine, key: Key, team: Team) -> Iterator[Batch]:
        """This rank's share of every step of a phase, all epochs in one stream."""
        epochs = range(phase.epochs * phase.cycles)
        picks = sampling.training_picks(key, len(self.dataset.train), phase.batch_size, team.rank, team.size, epochs)
        return loader.batches(self.dataset, self.dataset.train, picks, self.recipe.augment, phase.batch_size // team.size, self.device)

    def test_batches(self, team: Team) -> Iterator[Batch]:
        """This rank's share of the test samples, each of which the team sees once."""
        size = self.recipe.evaluate.batch_size
        picks = sampling.evaluation_picks(len(self.dataset.test), size, team.rank, team.size)
        return loader.batches(self.dataset, self.dataset.test, picks, None, size, self.device)

    def batchnorm_batches(self, team: Team) -> Iterator[Tensor]:
        """This rank's share of the images that batch norm is re-estimated on."""
        size, samples = self.recipe.batchnorm.batch_size, len(self.dataset.train)
        picks = sampling.batchnorm_picks(self.recipe.seed, samples, self.recipe.batchnorm.samples or samples, size, team.rank, team.size)
        return (images for images, _ in loader.batches(self.dataset, self.dataset.train, picks, self.recipe.augment, size, self.device))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.torch.type, dtype=torch.bfloat16, enabled=self.recipe.precision == "bf16")


def fit(model: nn.Module, job: Job, phase: LargeBatch | Refine, key: Key, team: Team) -> Iterator[Epoch]:
    """Trains `model` in place with SGD on batches shared by `team`, yielding each epoch at its end.

    Momentum starts at zero and is kept over the phase's cycles; the learning rate is interpolated at every step.
    Ends after all epochs, or with the first one whose training accuracy reaches `phase.stop_accuracy`. Raises RunError,
    on all ranks of the team, where a loss is not finite.
    """
    if phase.epochs == 0:
        return
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, **job.recipe.optimizer.model_dump())
    stream = job.training_batches(phase, key, team)
    steps = len(job.dataset.train) // phase.batch_size
    broadcast_weights_(model, team)
    with averaged_gradients(model, sgd, team, job.device) as optimizer:
        for epoch in range(phase.epochs * phase.cycles):
            cycle, within = divmod(epoch, phase.epochs)
            started = perf_counter()
            rates = [interpolate(phase.learning_rate, within + step / steps) for step in range(steps)]
            train = _train_epoch(model, optimizer, stream, rates, job, key, epoch, team)
            train_seconds = perf_counter() - started
            average_running_statistics_(model, team)
            trained = perf_counter()
            ends_cycle = within + 1 == phase.epochs or (phase.stop_accuracy is not None and train.accuracy >= phase.stop_accuracy)
            every = job.recipe.evaluate.every
            test = evaluate_job(model, job, team) if ends_cycle or (every and (epoch + 1) % every == 0) else None
            train_seconds, evaluate_seconds = team.maximum(train_seconds, perf_counter() - trained)
            yield Epoch(
                phase="large_batch" if isinstance(phase, LargeBatch) else "refine",
                group=None if isinstance(phase, LargeBatch) else key.group,
                cycle=cycle + 1,
                epoch=epoch + 1,
                learning_rate=interpolate(phase.learning_rate, within + 1),
                train=train,
                test=test,
                images=steps * phase.batch_size,
                train_seconds=train_seconds,
                evaluate_seconds=evaluate_seconds,
                ends_cycle=ends_cycle,
            )
            if ends_cycle and within + 1 < phase.epochs:
                break  # the training accuracy was reached


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Iterator[Batch],
    rates: list[float],
    job: Job,
    key: Key,
    epoch: int,
    team: Team,
) -> Evaluation:
    """One step per learning rate in `rates`. The epoch's running loss and accuracy, over the team."""
    model.train()
    running = _Running(
        team, f"{key.phase.name.lower()}" + (f" of group {key.group}" if key.phase is sampling.Phase.REFINE else ""), epoch + 1
    )
    for step, (rate, (images, labels)) in enumerate(zip(rates, stream, strict=False)):
        torch.manual_seed(key.torch_seed(epoch * len(rates) + step, team.rank))
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        with job.autocast():
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running.add(loss.detach(), logits.detach(), labels, rate)
    return running.result()


class _Running:
    """Sums of an epoch's losses and hits that make the host look at the device only every `CHECK_EVERY` steps."""

    def __init__(self, team: Team, phase: str, epoch: int):
        self.team, self.phase, self.epoch = team, phase, epoch
        self.losses: list[Tensor] = []
        self.hits: list[Tensor] = []
        self.rates: list[float] = []
        self.steps = 0
        self.loss, self.correct, self.samples = 0.0, 0.0, 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, rate: float) -> None:
        self.losses.append(loss * len(labels))
        self.hits.append((logits.argmax(1) == labels).sum())
        self.rates.append(rate)
        self.samples += len(labels)
        if len(self.losses) == CHECK_EVERY:
            self._look()

    def _look(self) -> None:
        losses = torch.stack(self.losses).double().cpu()
        self.team.agree(lambda: self._check(losses))
        self.loss += losses.sum().item()
        self.correct += torch.stack(self.hits).sum().item()
        self.steps += len(self.losses)
        self.losses, self.hits, self.rates = [], [], []

    def _check(self, losses: Tensor) -> None:
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            first = int(bad[0])
            raise RunError(
                f"the loss is {losses[first].item()} in {self.phase}, epoch {self.epoch}, step {self.steps + first + 1}, "
                f"at a learning rate of {self.rates[first]:.4g}: lower the rate, or warm up for longer"
            )

    def result(self) -> Evaluation:
        if self.losses:
            self._look()
        loss, correct, samples = self.team.sums(self.loss, self.correct, self.samples)
        return Evaluation(loss / samples, correct / samples)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], team: Team) -> Evaluation:
    """Cross-entropy and accuracy of `model` on the batches of all ranks of `team`, each sample counted once.

    `batches`: this rank's, (images (n, C, H, W), labels (n,) int64). The model's training mode is left as it was.
    """
    training = model.training
    model.eval()
    losses, hits, samples = [], [], 0
    for images, labels in batches:
        logits = model(images)
        losses.append(F.cross_entropy(logits.float(), labels, reduction="sum"))
        hits.append((logits.argmax(1) == labels).sum())
        samples += len(labels)
    model.train(training)
    loss = torch.stack(losses).double().sum().item() if losses else 0.0
    correct = torch.stack(hits).sum().item() if hits else 0
    loss, correct, samples = team.sums(loss, correct, samples)  # type: ignore[assignment]
    return Evaluation(loss / samples, correct / samples)


def evaluate_job(model: nn.Module, job: Job, team: Team) -> Evaluation:
    """`evaluate` on the job's test samples."""
    with job.autocast():
        return evaluate(model, job.test_batches(team), team)
