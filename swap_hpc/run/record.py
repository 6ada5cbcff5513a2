"""What the events of a run become: files, lines on the screen, and the numbers of `result.json`."""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn

from swap_hpc.average.agreement import check_equal
from swap_hpc.errors import Stopped
from swap_hpc.parallel.atomic import write_json
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1, Part, refinement_of
from swap_hpc.run.assignment import Assignment
from swap_hpc.run.best import BestKeeper, best_of_parts
from swap_hpc.run.board import Board
from swap_hpc.run.checkpoint import Checkpoints, Saved
from swap_hpc.run.checks import refines_one_group
from swap_hpc.run.journal import Journal
from swap_hpc.run.lines import Line
from swap_hpc.run.result import result_of
from swap_hpc.run.stopwatch import Stopwatch
from swap_hpc.run.tracker import tracker_of
from swap_hpc.run.weights import save_ema, save_model, save_snapshot, save_sum
from swap_hpc.train.evaluation import evaluate_for_report, evaluate_job
from swap_hpc.train.events import (
    Averaged,
    Continued,
    Epoch,
    Event,
    GroupArrived,
    GroupsArrived,
    LargeBatchEnded,
    Refreshed,
    SavePoint,
    SyncPoint,
)


def averages_file(checkpoints: Checkpoints) -> Path:
    """Return the file of the evaluations of the average before the end of the refinement."""
    return checkpoints.folder / "averages.json"


@dataclass
class Recorder:
    """The record of a run, in its folder and in memory."""

    assignment: Assignment
    journal: Journal
    watch: Stopwatch
    averages: list[Line]  # evaluations of the average before the end, so far
    phase_1_ranks: int
    # of each group's refinement; None: the number changed between starts
    refine_ranks: dict[Part, int | None]
    _is_saved: bool = False  # at the last save point
    _snapshot_is_due: bool = False  # at the next one
    _epoch_has_ended: bool = False  # since the last one
    best: BestKeeper | None = None

    def begin(self) -> None:
        """Begin the record, after the set-up.

        Raises:
            Stopped: on all ranks, one of them was asked to stop meanwhile.
        """
        self.watch.own["setup"] = perf_counter() - self.watch.started
        self.assignment.job.control.heartbeat("the set-up")
        self._agree_on_stop(self.assignment.job.control.stop)
        # A phase without epochs is never resumed, which would begin its lines anew.
        if not self.assignment.job.recipe.large_batch.epochs and PHASE_1 in self.journal.lines:
            self.journal.begin(PHASE_1, [])

    def resume(self, part: Part, saved: Saved | None) -> None:
        """Take over what an earlier start has recorded of a part, up to its last save."""
        if part in self.journal.lines:
            self.journal.begin(part, saved.notes["lines"] if saved else [])
            if self.best:
                team = self._team_of(part)
                self.best.resume(part, self.journal.lines[part], team)
        if not saved:
            return
        before = saved.notes["ranks"]
        if part == PHASE_1:
            self.journal.earlier_epochs = saved.point.at.epoch
            self.phase_1_ranks = before if saved.point.ended else self.phase_1_ranks
        else:
            is_one_number = saved.point.ended or before == self.assignment.ranks.world.size
            self.refine_ranks[part] = before if is_one_number else None
        self.watch.resume_from(saved.notes["seconds"])
        self.assignment.display.resumed(saved.point)

    def record(self, event: Event) -> None:
        """Record an event of `swap()`.

        Raises:
            RunError: on all ranks, a file cannot be written.
            Stopped: on all ranks, one of them was asked to stop, and all is saved.
            UserError: on all ranks, the optimizer keeps something that a file cannot hold.
        """
        match event:
            case Epoch():
                self._epoch(event)
            case SavePoint():
                self._savepoint(event)
            case LargeBatchEnded(model):
                self._large_batch_ended(model)
            case GroupArrived(part, model, sync):
                self.assignment.job.control.heartbeat(part.name)
                if sync.then == "end":
                    path = self.assignment.out / f"{part.name}.safetensors"
                    save_model(model, path, self.assignment.job.header, self.assignment.ranks.group)
            case GroupsArrived(sync):
                self.assignment.job.control.heartbeat("refine")
                self._agree_on_stop(self._stops_at(sync))
                # The wait for the slowest group belongs to no phase, unless it recurs in training.
                self.watch.lap("refine" if sync.then == "continue" else None)
            case Averaged(_, sync):
                self.assignment.job.control.heartbeat("average")
                self.watch.lap("average")
                self._agree_on_stop(self._stops_at(sync))
            case Continued():
                self.assignment.job.control.heartbeat("average")
                self.watch.lap("average")
                self._agree_on_stop(self.assignment.job.control.stop and self._is_saved)
            case Refreshed(model, sync):
                self.assignment.job.control.heartbeat("batchnorm")
                self.watch.lap("batchnorm")
                self._agree_on_stop(self._stops_at(sync))  # the refresh may have ended early
                self._evaluate_average(model, sync)

    def result(self, model: nn.Module) -> dict[str, Any]:
        """Return what `result.json` holds of a run that is complete; collective.

        On the first rank, which writes it: on the others it is empty.

        Raises:
            RunError: on all ranks, their models differ.
        """
        self.journal.end()
        ranks, world = self.assignment.ranks, self.assignment.ranks.world
        digest = check_equal(model, world)
        refine_ranks = set(self.refine_ranks.values())
        is_alike = world.first_unlike(repr(sorted(map(str, refine_ranks))).encode()) is None
        is_one_number = is_alike and len(refine_ranks) == 1 and self.assignment.chosen is None
        result = result_of(
            self.assignment.job.recipe,
            self.journal.lines,
            self.watch.slowest(world),
            self.assignment.job.device.peak_memory(),
            (self.phase_1_ranks, refine_ranks.pop() if is_one_number else None),
            digest,
            ranks,
        )
        if self.best:
            lines = self.journal.lines
            out, metric = self.assignment.out, self.assignment.job.recipe.metrics[0]
            best = best_of_parts(out, lines, metric, ranks)
            result |= {"best": best} if result else {}
        return result

    def _epoch(self, epoch: Epoch) -> None:
        self.assignment.display.epoch(epoch)
        self.journal.epoch(epoch)
        self.watch.own[epoch.part.phase.value] += epoch.train_seconds
        self.watch.own["evaluate"] += epoch.evaluate_seconds
        every = self.assignment.job.recipe.checkpoint.snapshots
        self._snapshot_is_due = every > 0 and epoch.epoch % every == 0
        self._epoch_has_ended = True

    def _savepoint(self, point: SavePoint) -> None:
        part, header = point.part, self.assignment.job.header
        team = self._team_of(part)
        if point.ended and point.cycle_sum.count > 1:
            save_sum(
                point.cycle_sum,
                self.assignment.out / f"{part.name}-cycles.safetensors",
                header,
                team,
            )
        others_own_it = part == PHASE_1 and refines_one_group(self.assignment.chosen)
        if point.ended and point.ema_weights and not others_own_it:
            save_ema(point, self.assignment.out / f"{part.name}-ema.safetensors", header, team)
        if self._snapshot_is_due:
            # The epoch has just ended: where groups continue from their average, not yet from it.
            save_snapshot(point, self.assignment.out / "snapshots", header, team)
            self._snapshot_is_due = False
        if self.best and self._epoch_has_ended:
            self.best.at_epoch_end(point, self.journal.lines[part], team)
        self._epoch_has_ended = False
        self._is_saved = point.due
        if not point.due:
            self.watch.lap()
            return
        begin = perf_counter()
        self.assignment.job.control.heartbeat(f"the start of a save of {part.name}")
        if self.best:
            self.best.before_save(point, self.journal.lines[part], team)
        self.assignment.checkpoints.save(point, self._notes(part), team)
        self.assignment.job.control.saved()
        self.watch.own["save"] += perf_counter() - begin
        self.watch.lap()
        saves_alone = part == PHASE_1 or not self.assignment.job.recipe.refine.average_every_steps
        if saves_alone and team.any(self.assignment.job.control.stop):
            self._agree_on_stop(True)

    def _team_of(self, part: Part) -> Team:
        ranks = self.assignment.ranks
        return ranks.world if part == PHASE_1 else ranks.group

    def _notes(self, part: Part) -> dict[str, Any]:
        """Return what is saved beside a part's save point, for `resume`."""
        ranks = self.refine_ranks.get(part, self.assignment.ranks.world.size)
        return {
            "ranks": None if refines_one_group(self.assignment.chosen) else ranks,
            "lines": self.journal.lines[part],
            "seconds": self.watch.seconds(),
        }

    def _stops_at(self, sync: SyncPoint) -> bool:
        """Tell whether this rank was asked to stop, and may: groups that continue save first."""
        return self.assignment.job.control.stop and sync.then != "continue"

    def _agree_on_stop(self, stops: bool) -> None:
        """Stop the run on all ranks if any rank wants to; collective over the world.

        Args:
            stops: this rank wants to, and what it holds is saved.

        Raises:
            Stopped: on all ranks, one of them was asked to stop.
        """
        with self.assignment.job.control.waiting():
            stop = self.assignment.ranks.world.any(stops)
        if stop:
            raise Stopped(
                f"stopped on request, all is saved in {self.assignment.out}: "
                "start it again to go on"
            )

    def _large_batch_ended(self, model: nn.Module) -> None:
        self.assignment.job.control.heartbeat(PHASE_1.name)
        self.watch.lap()
        if refines_one_group(self.assignment.chosen):
            return  # another job has written what follows
        metrics = self.assignment.job.recipe.metric_names
        found = self.journal.last(PHASE_1, metrics)
        if not found:  # the phase has no epoch, or was evaluated on other splits
            found = evaluate_for_report(model, self.assignment.job, self.assignment.ranks.world)
            self.watch.lap("evaluate")
        self.journal.evaluation("large_batch", found)
        for line in self.averages:
            self.journal.add(PHASE_1, line)
        path = self.assignment.out / f"{PHASE_1.name}.safetensors"
        save_model(model, path, self.assignment.job.header, self.assignment.ranks.world)
        self._agree_on_stop(self.assignment.job.control.stop)

    def _evaluate_average(self, model: nn.Module, sync: SyncPoint) -> None:
        job, world = self.assignment.job, self.assignment.ranks.world
        if sync.then == "end":
            self.journal.evaluation("swap", evaluate_for_report(model, job, world))
            self.watch.lap("evaluate")
            save_model(
                model, self.assignment.out / "swap.safetensors", self.assignment.job.header, world
            )
            return
        split = job.dataset.chosen_by
        found = evaluate_job(model, job, world, split)
        self.watch.lap("evaluate")
        self.assignment.display.average(sync.epoch, split, found)
        self.averages.append(self.journal.evaluation("average", {split: found}, epoch=sync.epoch))
        world.first(lambda: write_json(averages_file(self.assignment.checkpoints), self.averages))


def recorder_of(assignment: Assignment, started: float, averages: list[Line]) -> Recorder:
    """Return the recorder of a job that has recorded nothing yet.

    Args:
        assignment: the job's share of the run.
        started: `perf_counter()` when the process began.
        averages: evaluations of the average before the end, by earlier jobs.
    """
    world, group = assignment.ranks.world, assignment.ranks.group
    parts = [refinement_of(number) for number in assignment.ranks.groups]
    teams = dict.fromkeys(parts, group)
    if not refines_one_group(assignment.chosen):
        teams = {PHASE_1: world, **teams}  # otherwise another job owns metrics/world.jsonl
    recipe = assignment.job.recipe
    board = Board(assignment.out / "tensorboard", recipe) if recipe.tensorboard else None
    curves = [each for each in (board, tracker_of(recipe, assignment.out)) if each is not None]
    has_validation = assignment.job.dataset.validation is not None
    journal = Journal(assignment.out / "metrics", teams, curves, has_validation)
    refine_ranks: dict[Part, int | None] = dict.fromkeys(parts, world.size)
    recorder = Recorder(assignment, journal, Stopwatch(started), averages, world.size, refine_ranks)
    if recipe.checkpoint.best:
        folder, header = assignment.checkpoints.folder, assignment.job.header
        recorder.best = BestKeeper(assignment.out, folder, recipe.metrics[0], header)
    return recorder
