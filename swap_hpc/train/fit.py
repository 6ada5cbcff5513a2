"""`fit()`, one phase's training as a generator of epochs and save points."""

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import astuple, dataclass, field, replace
from time import perf_counter

import torch
from torch import Tensor, nn

from swap_hpc.average.agreement import check_agreement
from swap_hpc.average.kinds import averaged_tensors, team_means
from swap_hpc.average.sharing import average_buffers_, broadcast_weights_, share_extra_states_
from swap_hpc.average.state import entries_of, parts_of, state_of
from swap_hpc.average.uniform import WeightSum
from swap_hpc.data.sampling import Key, Phase
from swap_hpc.data.seeding import seed_all
from swap_hpc.errors import Diverged, RunError
from swap_hpc.parallel.devices import Memory
from swap_hpc.parallel.gradients import averaged_gradients
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import assign_
from swap_hpc.recipe.schedule import interpolate
from swap_hpc.recipe.schema import LargeBatch, Refine
from swap_hpc.train.evaluation import evaluate_job
from swap_hpc.train.events import Epoch, Evaluation, PhaseName, Running, SavePoint, part_name
from swap_hpc.train.job import Batch, Job
from swap_hpc.train.models import fill_
from swap_hpc.train.objective import as_float32
from swap_hpc.train.optimizers import build_optimizer

# Looking at the losses makes the host wait for the device, and agreeing on a save or a stop makes the ranks wait for each other.
LOOK_STEPS = 50  # at most, between looks


LOOK_SECONDS = 2.0  # about, between looks, where steps are slow; the slowest rank's

MEND = "lower the rate, or warm up for longer"


def fit(
    model: nn.Module,
    job: Job,
    phase: LargeBatch | Refine,
    key: Key,
    team: Team,
    cycles: WeightSum | None = None,
) -> Generator[Epoch | SavePoint, None, None]:
    """Trains `model` in place with SGD on batches shared by `team`, from where `job.load` finds the phase.

    Yields first a `SavePoint` that says where; then each epoch at its end, followed by a `SavePoint`; and inside an epoch
    a `SavePoint` at the step boundary at which the team's ranks agree that one of them is due to save or asked to stop. They
    agree about every `LOOK_SECONDS`, and at least every `LOOK_STEPS` steps. What is trained does not depend on when they do.

    Momentum starts at zero and is kept over the phase's cycles; the learning rate is interpolated at every step. The
    weights at each cycle's end of a refinement are added to `cycles`. Ends after all epochs, or with the first one whose training accuracy
    reaches `phase.stop_accuracy`. Raises RunError, on all ranks of the team, where a loss or a weight is not finite, and, at a save
    that is due and at the end, where the ranks' weights are not alike.
    """
    broadcast_weights_(model, team)
    if phase.epochs == 0:
        return
    group = key.group if key.phase is Phase.REFINE else None
    start = job.load(part_name(group), team)
    cycles = cycles if cycles is not None else WeightSum()
    if start:
        state, source = start.weights | start.buffers, f"of the checkpoint of {start.name}"
        team.agree(lambda: fill_(model, state, source))
        cycles.merge_(start.cycles)
        if start.ended:
            yield replace(start, due=False)
            return
    plain = build_optimizer(model, job.recipe.optimizer)
    with averaged_gradients(model, plain, team, job.device, phase.accumulate) as optimizer:
        # static shapes: else a process that saw other sizes before compiles another graph than one that starts here
        forward = torch.compile(model, dynamic=False) if job.recipe.compile else model
        training = _Training(model, forward, optimizer, job, phase, key, group, team, cycles)
        if start:
            training.go_on_from_(start)
        yield training.savepoint(due=False)
        yield from training.epochs()


@dataclass
class _Training:
    """A phase on its way: what does not change, and what does."""

    model: nn.Module
    forward: Callable[[Tensor], Tensor]  # `model`, compiled or not
    optimizer: torch.optim.Optimizer
    job: Job
    phase: LargeBatch | Refine
    key: Key
    group: int | None
    team: Team
    cycles: WeightSum
    epoch: int = 0  # whole epochs done
    step: int = 0  # steps done of the next one
    ended: bool = False
    running: Running = field(default_factory=Running)
    look_steps: int = 1

    def go_on_from_(self, start: SavePoint) -> None:
        self.epoch, self.step, self.running = start.epoch, start.step, start.running
        parameters = dict(self.model.named_parameters())
        for name, momentum in start.momentum.items():
            self.optimizer.state[parameters[name]]["momentum_buffer"] = torch.empty_like(
                parameters[name]
            ).copy_(momentum)

    def savepoint(self, due: bool) -> SavePoint:
        weights, buffers = parts_of(state_of(self.model), self.model)
        momenta = {
            name: self.optimizer.state[p].get("momentum_buffer")
            for name, p in self.model.named_parameters()
        }
        return SavePoint(
            phase=self.phase_name,
            group=self.group,
            epoch=self.epoch,
            step=self.step,
            ended=self.ended,
            due=due,
            momentum={name: t for name, t in momenta.items() if t is not None},
            cycles=self.cycles,
            running=self.running,
            weights=weights,
            buffers=buffers,
            means=tuple(sorted(entries_of(self.model, team_means(self.model).values()))),
        )

    def epochs(self) -> Iterator[Epoch | SavePoint]:
        phase, job, team = self.phase, self.job, self.team
        steps = job.steps(phase)
        stream = job.training_batches(phase, self.key, team, self.epoch, self.step)
        while not self.ended:
            cycle, within = divmod(self.epoch, phase.epochs)
            rates = [
                interpolate(phase.learning_rate, within + step / steps) for step in range(steps)
            ]
            due = yield from self._steps(stream, rates)
            seconds = self.running.seconds
            train = _means(self.running, team)
            average_buffers_(self.model, team)
            share_extra_states_(self.model, team)
            trained = perf_counter()
            self.epoch, self.step, self.running = self.epoch + 1, 0, Running()
            reached = phase.stop_accuracy is not None and train.accuracy >= phase.stop_accuracy
            self.ended = reached or self.epoch == phase.epochs * phase.cycles
            ends_cycle = reached or self.epoch % phase.epochs == 0
            every = job.recipe.evaluate.every
            test = (
                evaluate_job(self.model, job, team)
                if ends_cycle or (every and self.epoch % every == 0)
                else None
            )
            memory = job.device.peak_memory()
            train_seconds, evaluate_seconds, *peaks = team.maximum(
                seconds, perf_counter() - trained, *astuple(memory)
            )
            if ends_cycle and self.group is not None:
                self.cycles.add_(self.model)
            yield Epoch(
                phase=self.phase_name,
                group=self.group,
                cycle=cycle + 1,
                epoch=self.epoch,
                learning_rate=interpolate(phase.learning_rate, within + 1),
                train=train,
                test=test,
                images=steps * phase.batch_size,
                train_seconds=train_seconds,
                evaluate_seconds=evaluate_seconds,
                peak_memory=Memory(*map(int, peaks)),
                ends_cycle=ends_cycle,
            )
            due = due or self.ended or self._is_looked_at()
            yield self._checked(self.savepoint(due), f"at a learning rate of {rates[-1]:.4g}")

    def _is_looked_at(self) -> bool:
        """Tell whether groups wait for each other after this epoch. They save first: they may be asked to stop while they wait."""
        every = self.job.recipe.refine.evaluate_average if self.group is not None else 0
        return every > 0 and self.epoch % every == 0

    def _steps(
        self, stream: Iterator[Batch], rates: list[float]
    ) -> Generator[SavePoint, None, bool]:
        """The rest of an epoch, one step per learning rate. Returns whether a save is due at its end."""
        self.model.train()
        seen: list[_Step] = []  # since the last look
        saves = self.job.recipe.checkpoint.epochs
        is_saved = saves > 0 and (self.epoch + 1) % saves == 0
        due, started = False, perf_counter()
        # drawn together, since each alone costs ten times as much between a model's operators
        seeds = [
            self.key.torch_seed(self.epoch * len(rates) + step, self.team.rank)
            for step in range(len(rates))
        ]
        following: Batch | None = None
        while self.step < len(rates):
            batch = following or next(stream)
            seed_all(seeds[self.step])
            rate = rates[self.step]
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = rate
            self.optimizer.zero_grad()
            loss, hits = backward(self.forward, batch, self.job, self.phase.accumulate)
            samples, ends = len(batch[1]), self.step + 1 == len(rates)
            following = (
                None if ends else next(stream)
            )  # before the step, which waits for the other ranks' gradients
            self.optimizer.step()
            self.step += 1
            seen.append(_Step(loss, hits, samples, rate, self.where))
            self.job.control.beat(self.where)
            every = self.phase.average_every_steps
            meets = every is not None and (self.epoch * len(rates) + self.step) % every == 0
            if len(seen) >= self.look_steps or ends or meets:
                # groups that go on from their average save where they meet, all at once
                due = self._look(seen, started, ends and is_saved) and not every
                seen, started = [], perf_counter()
                if (due or meets) and self.step < len(rates):
                    yield self._checked(self.savepoint(due), f"at a learning rate of {rate:.4g}")
                    started = perf_counter()
        return due

    @property
    def phase_name(self) -> PhaseName:
        return "large_batch" if self.group is None else "refine"

    @property
    def where(self) -> str:
        phase = self.phase_name + ("" if self.group is None else f" of group {self.group}")
        return f"{phase}, epoch {self.epoch + 1}, step {self.step}"

    def _look(self, seen: list["_Step"], started: float, wanted: bool) -> bool:
        """Adds the steps' losses and hits to the running sums. Returns whether any rank of the team is due to save.

        `wanted`: the recipe asks for a save here.
        """
        losses = torch.stack([step.loss for step in seen]).tolist()
        hits = torch.stack([step.hits for step in seen]).tolist()
        seconds = perf_counter() - started
        bad = [
            (step, loss) for step, loss in zip(seen, losses, strict=True) if not math.isfinite(loss)
        ]
        fails, due, per_step = self.team.maximum(
            len(bad), self.job.control.due(wanted), seconds / len(seen)
        )
        if fails:
            self.team.agree(lambda: _refuse(*bad[0]) if bad else None)
        for step, loss, correct in zip(seen, losses, hits, strict=True):
            self.running = self.running.to(loss * step.samples, correct, step.samples)
        self.running = replace(self.running, seconds=self.running.seconds + seconds)
        self.look_steps = max(1, min(LOOK_STEPS, int(LOOK_SECONDS / per_step)))
        return bool(due)

    def _checked(self, point: SavePoint, rate: str) -> SavePoint:
        """`point`. Raises RunError, on all ranks, rather than let weights be saved that training cannot go on from."""
        if point.due:
            self.team.agree(lambda: _check_finite(point, f"{self.where}, {rate}"))
            check_agreement(self.model, self.team, self.where)
        return point


def backward(
    forward: Callable[[Tensor], Tensor], batch: Batch, job: Job, parts: int
) -> tuple[Tensor, Tensor]:
    """Adds the gradients of this rank's share of a step, computed in `parts`, to those of the model behind `forward`.

    Returns its mean loss and its hits, scalars on the device.
    """
    objective = job.objective
    losses, hits = [], []
    for images, labels in (
        [batch] if parts == 1 else zip(*(tensor.chunk(parts) for tensor in batch), strict=True)
    ):
        with job.autocast():
            outputs = forward(images)
        outputs = as_float32(outputs)
        loss = objective.loss(outputs, labels)
        (loss / parts if parts > 1 else loss).backward()
        losses.append(loss.detach())
        hits.append(objective.score(outputs, labels).detach().sum())
    return (
        (losses[0], hits[0])
        if parts == 1
        else (torch.stack(losses).mean(), torch.stack(hits).sum())
    )


@dataclass(frozen=True)
class _Step:
    """What a step leaves to look at, on the device."""

    loss: Tensor  # scalar, the mean over this rank's samples
    hits: Tensor  # scalar int64
    samples: int
    rate: float
    where: str


def _check_finite(point: SavePoint, where: str) -> None:
    if not torch.stack([t.isfinite().all() for t in point.weights.values()]).all():
        raise Diverged(f"a weight is not finite after {where}: {MEND}")


def _refuse(step: _Step, loss: float) -> None:
    raise Diverged(
        f"the loss is {loss} in {step.where}, at a learning rate of {step.rate:.4g}: {MEND}"
    )


def _means(running: Running, team: Team) -> Evaluation:
    loss, correct, samples = team.sums(running.loss, running.correct, running.samples)
    return Evaluation(loss / samples, correct / samples)


class Refinement:
    """A group's copy of a model on its way through phase 2, to be trained in parts."""

    def __init__(self, group: int, model: nn.Module, job: Job, team: Team):
        self.group, self.job, self.team = group, job, team
        self.model = model  # until it begins, when it takes a copy
        self.cycles = WeightSum()
        self.at = 0  # steps done
        self._stands: SavePoint | None = None  # its tensors are the copy's own
        self._events: Generator[Epoch | SavePoint, None, None] | None = None

    def until(self, step: int) -> Iterator[Epoch | SavePoint]:
        """Trains on until that many steps are done, where they are not already."""
        refine = self.job.recipe.refine
        steps = self.job.steps(refine)
        if self._events is None:
            self.model = self.job.copy_of(self.model)
            self._events = fit(
                self.model,
                self.job,
                refine,
                Key(self.job.recipe.seed, Phase.REFINE, self.group),
                self.team,
                self.cycles,
            )
        try:
            for event in self._events if self.at < step else ():
                yield event
                if isinstance(event, SavePoint):
                    self._stands, self.at = event, event.epoch * steps + event.step
                    if step <= self.at and not event.ended:
                        break
        except GeneratorExit:
            self._events.close()
            raise
        if self.at > step:
            raise RunError(
                f"group {self.group} is {self.at} steps on, past the meeting after {step}: the meetings' record was lost"
            )
        self.model.zero_grad()  # frees the gradients

    def add_to_(self, total: WeightSum) -> None:
        """Adds the weights at the ends of the cycles so far; inside a cycle, the weights as they are, too."""
        total.merge_(self.cycles)
        if self.at % (self.job.steps(self.job.recipe.refine) * self.job.recipe.refine.epochs):
            total.add_(self.model)

    @torch.no_grad()
    def go_on_from_(self, model: nn.Module, due: bool) -> SavePoint:
        """Gives the copy the weights of `model`; momentum and batch-norm statistics stay its own. Returns where it stands then."""
        assert self._stands is not None
        weights = averaged_tensors(self.model)
        for name, tensor in averaged_tensors(model).items():
            assign_(weights[name], tensor)
        if due:
            _check_finite(
                self._stands, f"the groups' average after step {self.at} of the refinement"
            )
        return replace(self._stands, due=due)
