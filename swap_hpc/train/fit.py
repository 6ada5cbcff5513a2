"""`fit()`: the training of one part of a run, as a generator of epochs and save points."""

from collections.abc import Generator, Iterator
from dataclasses import astuple, dataclass, replace
from time import perf_counter

import torch
from torch import nn

from swap_hpc.average.agreement import check_agreement
from swap_hpc.average.kinds import team_means
from swap_hpc.average.sharing import average_buffers_, broadcast_weights_, share_extra_states_
from swap_hpc.average.state import entries_of, split_state, state_of
from swap_hpc.average.uniform import WeightSum
from swap_hpc.data.dataset import SplitName
from swap_hpc.data.nested import first_tensor
from swap_hpc.data.sampling import EVERY_RANK, Key
from swap_hpc.parallel.devices import Memory
from swap_hpc.parallel.gradients import gradient_averaging
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import Part, Phase
from swap_hpc.train.ema import MovingAverage
from swap_hpc.train.evaluation import evaluate_for_report, evaluate_job
from swap_hpc.train.events import (
    FROM_THE_BEGINNING,
    Epoch,
    Evaluation,
    Position,
    Running,
    SavePoint,
    Saves,
)
from swap_hpc.train.job import Batch, Job
from swap_hpc.train.models import fill_
from swap_hpc.train.objective import Objective
from swap_hpc.train.optimizers import build_optimizer
from swap_hpc.train.parameter_groups import freeze_
from swap_hpc.train.precision import loss_scaler
from swap_hpc.train.state import optimizer_state, restore_optimizer_
from swap_hpc.train.step import Stepper
from swap_hpc.train.team_check import StepLoss, TeamCheck, check_finite

BEGINNING = Position(0, 0)


def fit(
    model: nn.Module,
    job: Job,
    part: Part,
    team: Team,
    resume_from: Saves = FROM_THE_BEGINNING,
    cycle_sum: WeightSum | None = None,
) -> Generator[Epoch | SavePoint, None, None]:
    """Train `model` in place, on batches shared by the ranks of `team`.

    The optimizer's state is fresh at the beginning of the part and kept over its cycles; the
    learning rate is computed at every step. Training ends after all epochs, or with the first one
    whose training accuracy reaches `stop_accuracy`.

    Args:
        model: on this rank's device; the first rank's weights are given to all.
        job: the run's.
        part: phase 1, or the refinement of a group.
        team: the ranks that train the model together.
        resume_from: where the part resumes from.
        cycle_sum: the weights at the end of each cycle of a refinement are added to it.

    Yields:
        Nothing if the part has no epochs. Otherwise first a `SavePoint` that says where the part
        stands; it is the only one if the part has ended. Then, for each epoch, an `Epoch` and a
        `SavePoint` at its end. Inside an epoch, a `SavePoint` at each step after which the groups
        continue from their average, and wherever the team agrees that one of its ranks is due to
        save or was asked to stop; see `team_check` for how often they agree.

    Raises:
        Diverged: on all ranks of the team, a loss, or a weight that is due to be saved, is not
            finite.
        RunError: on all ranks of the team, the weights of two ranks differ where a save is due.
    """
    broadcast_weights_(model, team)
    settings = job.settings(part)
    if settings.epochs == 0:
        return
    start = resume_from.load(part, team)
    cycle_sum = cycle_sum if cycle_sum is not None else WeightSum()
    if start:
        state, source = start.weights | start.buffers, f"of the checkpoint of {part.name}"
        team.agree(lambda: fill_(model, state, source))
        cycle_sum.merge_(start.cycle_sum)
        if start.ended:
            yield replace(start, due=False)
            return
    freeze_(model, job.recipe.optimizer)
    optimizer = build_optimizer(model, job.recipe.optimizer)
    with gradient_averaging(model, team, job.device, settings.accumulate) as average_gradients:
        # Shapes are static: a process that saw other sizes before would otherwise compile another
        # graph than one that starts here.
        forward = torch.compile(model, dynamic=False) if job.recipe.compile else model
        scaler = loss_scaler(job.recipe.precision, job.device.torch, optimizer)
        stepper = Stepper(forward, optimizer, average_gradients, scaler, job, settings.accumulate)
        ema = MovingAverage(model, settings.ema) if settings.ema is not None else None
        training = _Training(
            model, stepper, ema, job, part, team, cycle_sum, TeamCheck(team, job.control)
        )
        if start:
            training.restore_(start)
        yield training.savepoint(due=False)
        job.control.heartbeat(f"the start of {part.name}")
        yield from training.epochs()


@dataclass
class _Training:
    """A part of a run in training."""

    model: nn.Module
    stepper: Stepper
    ema: MovingAverage | None
    job: Job
    part: Part
    team: Team
    cycle_sum: WeightSum
    check: TeamCheck
    at: Position = BEGINNING
    ended: bool = False

    def restore_(self, start: SavePoint) -> None:
        self.at, self.check.running = start.at, start.running
        restore_optimizer_(self.stepper.optimizer, self.model, start.training["optimizer"])
        if self.stepper.scaler.is_enabled():
            self.stepper.scaler.load_state_dict(start.training["loss_scale"])
        if self.ema:
            self.ema.restore_(start.ema_weights | start.ema_buffers)

    def savepoint(self, due: bool) -> SavePoint:
        weights, buffers = split_state(state_of(self.model), self.model)
        training = {"optimizer": optimizer_state(self.stepper.optimizer, self.model)}
        if self.stepper.scaler.is_enabled():
            training["loss_scale"] = self.stepper.scaler.state_dict()
        averages = self.ema.averages if self.ema else {}
        return SavePoint(
            part=self.part,
            at=self.at,
            ended=self.ended,
            due=due,
            weights=weights,
            buffers=buffers,
            training=training,
            cycle_sum=self.cycle_sum,
            running=self.check.running,
            means=tuple(sorted(entries_of(self.model, team_means(self.model).values()))),
            ema_weights={name: t for name, t in averages.items() if name in weights},
            ema_buffers={name: t for name, t in averages.items() if name in buffers},
        )

    def epochs(self) -> Iterator[Epoch | SavePoint]:
        settings, job = self.job.settings(self.part), self.job
        steps = job.steps(settings)
        stream = job.training_batches(settings, self._key, self.team, *self.at)
        while not self.ended:
            epoch_in_cycle = self.at.epoch % settings.epochs
            rates = [settings.rate(epoch_in_cycle + step / steps) for step in range(steps)]
            due = yield from self._steps(stream, rates)
            epoch = self._end_epoch(steps)
            yield epoch
            due = due or self.ended or self._is_sync_epoch()
            yield self._checked(self.savepoint(due), rates[-1])

    def _end_epoch(self, steps: int) -> Epoch:
        """Move on to the next epoch. Make buffers alike on all ranks, and evaluate where due."""
        settings, job, team = self.job.settings(self.part), self.job, self.team
        cycle, epoch_in_cycle = divmod(self.at.epoch, settings.epochs)
        seconds, updates = self.check.running.seconds, self.check.running.updates
        train = _means(self.check.running, job.objective, team)
        average_buffers_(self.model, team)
        share_extra_states_(self.model, team)
        if self.ema:
            self.ema.share_buffers_(self.model, team)
        trained = perf_counter()
        self.at, self.check.running = Position(self.at.epoch + 1, 0), Running()
        target = settings.stop_accuracy
        reached = target is not None and train.main >= target
        self.ended = reached or self.at.epoch == settings.epochs * settings.cycles
        ends_cycle = reached or self.at.epoch % settings.epochs == 0
        every = job.recipe.evaluate.every
        is_evaluated = ends_cycle or (every > 0 and self.at.epoch % every == 0)
        found = self._evaluated(ends_cycle) if is_evaluated else {}
        ema = self._evaluated_average(ends_cycle) if is_evaluated else {}
        train_seconds, evaluate_seconds, *peaks = team.maximum(
            seconds, perf_counter() - trained, *astuple(job.device.peak_memory())
        )
        if ends_cycle and self.part.phase is Phase.REFINE:
            self.cycle_sum.add_(self.model)
        return Epoch(
            part=self.part,
            cycle=cycle + 1,
            epoch=self.at.epoch,
            learning_rate=settings.rate_until(epoch_in_cycle + 1),
            train=train,
            test=found.get("test"),
            validation=found.get("validation"),
            images=steps * settings.batch_size,
            train_seconds=train_seconds,
            evaluate_seconds=evaluate_seconds,
            peak_memory=Memory(*map(int, peaks)),
            ends_cycle=ends_cycle,
            updates=updates,
            ema=ema,
        )

    def _evaluated(self, ends_cycle: bool) -> dict[SplitName, Evaluation]:
        """Evaluate the model on the split that choices are made by; at a cycle's end on all."""
        if ends_cycle:
            return evaluate_for_report(self.model, self.job, self.team)
        split = self.job.dataset.chosen_by
        return {split: evaluate_job(self.model, self.job, self.team, split)}

    def _evaluated_average(self, ends_cycle: bool) -> dict[SplitName, Evaluation]:
        """Evaluate the moving average of the weights as the model; empty without one."""
        if not self.ema:
            return {}
        with self.ema.in_place_of(self.model):
            return self._evaluated(ends_cycle)

    def _is_sync_epoch(self) -> bool:
        """Tell whether the groups wait for each other after this epoch.

        They save first, since they may be asked to stop while they wait.
        """
        refines = self.part.phase is Phase.REFINE
        every = self.job.recipe.refine.evaluate_average if refines else 0
        return every > 0 and self.at.epoch % every == 0

    def _steps(
        self, stream: Iterator[Batch], rates: list[float]
    ) -> Generator[SavePoint, None, bool]:
        """Train the rest of an epoch, one step for each learning rate.

        Returns:
            Whether a save is due at its end.
        """
        self.model.train()
        self.check.begin()
        steps, due = len(rates), False
        sync_every = self.job.settings(self.part).average_every_steps
        saves_every = self.job.recipe.checkpoint.epochs
        is_saved_at_end = saves_every > 0 and (self.at.epoch + 1) % saves_every == 0
        # The epoch's seeds are drawn at once: one draw per step, between the model's operators,
        # costs ten times as much.
        first = self.at.epoch * steps
        seeds = [self._key.torch_seed(first + step, self.team.rank) for step in range(steps)]
        following: Batch | None = None
        while self.at.step < steps:
            batch = following or next(stream)
            samples, rate = len(first_tensor(batch[1])), rates[self.at.step]
            loss, sums = self.stepper.compute_gradients(batch, rate, seeds[self.at.step])
            ends = self.at.step + 1 == steps
            # The next batch is asked for before the update, which waits for other ranks' gradients.
            following = None if ends else next(stream)
            update = self.stepper.update(self._update_seed(first + self.at.step))
            if self.ema:
                self.ema.update_(self.model)
            self.at = Position(self.at.epoch, self.at.step + 1)
            self.check.add(StepLoss(loss, sums, samples, rate, self._where, update))
            self.job.control.heartbeat(self._where)
            syncs = sync_every is not None and (first + self.at.step) % sync_every == 0
            # The team checks its losses when enough of them have come, at the end of an epoch, and
            # at a sync point. It may then agree on a save: inside an epoch it is yielded here, at
            # the end by `epochs`. A sync point is yielded in any case, to be trained from.
            if self.check.is_due or ends or syncs:
                agreed = self.check.agree(ends and is_saved_at_end)
                # groups that continue from their average save at their sync points, all at once
                due = agreed and not sync_every
                if (due or syncs) and not ends:
                    yield self._checked(self.savepoint(due), rate)
                self.check.begin()
        return due

    def _update_seed(self, step: int) -> int | None:
        """Return a seed for an optimizer of the user's own, which may draw random numbers."""
        is_own = ":" in self.job.recipe.optimizer.name
        return self._key.torch_seed(step, EVERY_RANK) if is_own else None

    @property
    def _key(self) -> Key:
        return Key.of(self.job.recipe.seed, self.part)

    @property
    def _where(self) -> str:
        group = "" if self.part.group is None else f" of {self.part}"
        return f"{self.part.phase}{group}, epoch {self.at.epoch + 1}, step {self.at.step}"

    def _checked(self, point: SavePoint, rate: float) -> SavePoint:
        """Return `point`; where it is due to be saved, only if training can resume from it."""
        if point.due:
            where = f"{self._where}, at a learning rate of {rate:.4g}"
            self.team.agree(lambda: check_finite(point, where))
            check_agreement(self.model, self.team, self._where)
        return point


def _means(running: Running, objective: Objective, team: Team) -> Evaluation:
    # A rank that resumed on another number of ranks may have no sample of the epoch yet.
    mine = running.sums or [0.0] * objective.size
    loss, samples, *sums = team.sums(running.loss, running.samples, *mine)
    return objective.evaluation(loss, sums, samples)
