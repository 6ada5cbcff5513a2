"""What a run's events become: files, lines on the screen, the numbers of its result."""

import json
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn

from swap_hpc.average.agreement import check_equal
from swap_hpc.errors import RunError, Stopped, UserError
from swap_hpc.parallel.atomic import write_json
from swap_hpc.parallel.grid import Ranks
from swap_hpc.parallel.teams import Team
from swap_hpc.run.board import Board
from swap_hpc.run.checkpoint import Checkpoints, Position
from swap_hpc.run.display import Display
from swap_hpc.run.journal import Journal, Line
from swap_hpc.run.part import Part, check_ranks
from swap_hpc.run.result import result_of
from swap_hpc.run.stopwatch import Stopwatch
from swap_hpc.run.weights import save_model, save_snapshot, save_sum
from swap_hpc.swap import swap
from swap_hpc.train.control import Control
from swap_hpc.train.evaluation import evaluate_job
from swap_hpc.train.events import Done, Epoch, Event, Meeting, SavePoint, part_name
from swap_hpc.train.job import Job

NOWHERE: Position = (-1, 0)  # no save is there


class Consumer:
    """What `swap()` yields, turned into files, lines on the screen, and the numbers of `result.json`."""

    def __init__(
        self,
        job: Job,
        ranks: Ranks,
        out: Path,
        checkpoints: Checkpoints,
        display: Display,
        control: Control,
        started: float,
        part: Part,
    ) -> None:
        self.ranks, self.out, self.checkpoints, self.display, self.control = (
            ranks,
            out,
            checkpoints,
            display,
            control,
        )
        self.part = part
        self.trained_on = ranks.world.size  # ranks
        self.refined_on: dict[str, int | None] = dict.fromkeys(
            map(part_name, ranks.groups), ranks.world.size
        )  # None: several numbers
        self.saved = False  # at the last save point
        self.snapshot_due = False  # at the next one
        shared = (
            {"world": ranks.world} if part.phase != "refine" else {}
        )  # what all groups share is other jobs' then
        board = Board(out / "tensorboard", job.recipe) if job.recipe.tensorboard else None
        self.journal = Journal(
            out / "metrics",
            shared | {part_name(group): ranks.group for group in ranks.groups},
            board,
        )
        self.watch = Stopwatch(started)
        self.averages: list[Line] = ranks.world.broadcast(
            ranks.world.first(self._saved_averages) or []
        )
        # groups that go on from their average have to stand at one step
        self.together: Position | None = None
        if job.recipe.refine.average_every_steps:
            self.together = (
                checkpoints.common([part_name(group) for group in ranks.groups], ranks.world)
                or NOWHERE
            )
            for group in ranks.groups:
                checkpoints.forget_after(self.together, part_name(group), ranks.group)
        self.job = replace(job, control=control, load=self._load, met=self._met(job))
        control.save_seconds = job.recipe.checkpoint.minutes * 60 or float("inf")
        control.min_seconds = job.recipe.checkpoint.min_seconds

    def consume(self, model: nn.Module) -> dict[str, Any] | None:
        self.watch.own["setup"] = perf_counter() - self.watch.started
        self._meet(self.control.stop)
        if not self.job.recipe.large_batch.epochs and "world" in self.journal.lines:
            self.journal.begin("world", [])
        events = swap(model, self.job, self.ranks)
        try:
            for event in events:
                self._consume(event)
                if isinstance(event, Done) and event.what == self.part.last:
                    self.journal.end()
                    return None
        except Stopped:  # all ranks leave together
            events.close()
            raise
        self.journal.end()
        digest = check_equal(model, self.ranks.world)
        refined_on = {
            ranks
            for mine in self.ranks.world.allgather(set(self.refined_on.values()))
            for ranks in mine
        }
        ranks = (
            self.trained_on,
            refined_on.pop() if len(refined_on) == 1 and self.part.phase is None else None,
        )
        seconds, memory = self.watch.slowest(self.ranks.world), self.job.device.peak_memory()
        return result_of(
            self.job.recipe, self.journal.lines, seconds, memory, ranks, digest, self.ranks.world
        )

    def _consume(self, event: Event) -> None:
        if isinstance(event, Epoch):
            self._epoch(event)
        elif isinstance(event, SavePoint):
            self._savepoint(event)
        else:
            self._done(event.what, event.model, event.meeting)

    def _load(self, part: str, team: Team) -> SavePoint | None:
        """Where a part of the run goes on from; its metrics and times go on, too."""
        saved = self.checkpoints.load(
            part, team, self.together if part != part_name(None) else None
        )
        if self.part.needs(part) and not (saved and saved.point.ended):
            phase = (
                "large_batch"
                if part == part_name(None)
                else f"refine --group {int(part.removeprefix('group-'))}"
            )
            raise UserError(
                f"{self.out}: {part} has not ended, and this job does not train it: first --phase {phase}"
            )
        if part == part_name(None):
            if saved and saved.point.ended:
                self.trained_on = saved.notes["ranks"]
            else:
                check_ranks(
                    self.job.recipe, team.size, self.part
                )  # on other ranks its end may have been lost
        if saved and part != part_name(None):
            before = saved.notes["ranks"]
            self.refined_on[part] = (
                before if saved.point.ended or before == self.ranks.world.size else None
            )
        name = "world" if part == part_name(None) else part
        if name in self.journal.lines:
            self.journal.begin(name, saved.notes["lines"] if saved else [])
        if not saved:
            return None
        self.watch.go_on_from(saved.notes["seconds"])
        self.display.goes_on(saved.point)
        return saved.point

    def _met(self, job: Job) -> int:
        """Meetings of the groups that are over."""
        if not self.together:
            return len(self.averages)
        epoch, step = self.together
        return sum(
            meeting.then == "go_on" and meeting.step <= epoch * job.steps(job.recipe.refine) + step
            for meeting in job.meetings
        )

    def _epoch(self, epoch: Epoch) -> None:
        self.display.epoch(epoch)
        self.journal.epoch(epoch)
        self.watch.own[epoch.phase] += epoch.train_seconds
        self.watch.own["evaluate"] += epoch.evaluate_seconds
        every = self.job.recipe.checkpoint.snapshots
        self.snapshot_due = every > 0 and epoch.epoch % every == 0

    def _savepoint(self, point: SavePoint) -> None:
        team = self.ranks.world if point.group is None else self.ranks.group
        if point.ended and point.cycles.count > 1:
            save_sum(
                point.cycles, self.out / f"{point.name}-cycles.safetensors", self.job.header, team
            )
        if self.snapshot_due:  # the epoch has just ended; where groups go on from their average, they are at it after that
            save_snapshot(point, self.out / "snapshots", self.job.header, team)
            self.snapshot_due = False
        self.saved = point.due
        if not point.due:
            self.watch.lap()
            return
        begin = perf_counter()
        self.control.beat(f"the start of a save of {point.name}")
        lines = self.journal.lines["world" if point.group is None else point.name]
        ranks = (
            self.refined_on.get(point.name, self.ranks.world.size)
            if self.part.phase != "refine"
            else None
        )
        notes = {"ranks": ranks, "lines": lines, "seconds": self.watch.seconds()}
        self.checkpoints.save(point, notes, team)
        self.control.saved()
        self.watch.own["save"] += perf_counter() - begin
        self.watch.lap()
        if (point.group is None or not self.together) and team.any(self.control.stop):
            self._meet(True)

    def _meet(self, stops: bool) -> None:
        """The ranks wait for each other. Raises Stopped, on all, where one of them was asked to stop."""
        with self.control.waiting():
            stop = self.ranks.world.any(stops)
        if stop:
            raise Stopped(
                f"stopped on request, all is saved in {self.out}: start it again to go on"
            )

    def _done(self, what: str, model: nn.Module, meeting: Meeting | None) -> None:
        self.control.beat(what)
        if meeting is None:
            self._large_batch(model)
            return
        world = self.ranks.world
        stops = self.control.stop and meeting.then != "go_on"  # where the groups save first
        if what.startswith("group-") and meeting.then == "end":
            save_model(model, self.out / f"{what}.safetensors", self.job.header, self.ranks.group)
        elif what == "refine":
            self._meet(stops)
            # waiting for the slowest group is part of neither phase, but where it has to be done again and again
            self.watch.lap("refine" if meeting.then == "go_on" else None)
        elif what == "average":
            self.watch.lap("average")
            self._meet(stops)
        elif what == "go_on":
            self.watch.lap("average")
            self._meet(self.control.stop and self.saved)
        elif what == "batchnorm":
            self.watch.lap("batchnorm")
            self._meet(stops)  # it may have ended early
            averaged = evaluate_job(model, self.job, world)
            self.watch.lap("evaluate")
            if meeting.then == "end":
                self.journal.evaluation("swap", averaged)
                save_model(model, self.out / "swap.safetensors", self.job.header, world)
            else:
                self.display.average(meeting.epoch, averaged)
                self.averages.append(
                    self.journal.evaluation("average", averaged, epoch=meeting.epoch)
                )
                world.first(lambda: write_json(self._averages, self.averages))

    def _large_batch(self, model: nn.Module) -> None:
        self.watch.lap()
        if self.part.phase == "refine":  # what it left is written already
            return
        test = self.journal.last_test("world")
        if test is None:  # no epoch of this phase: the model came from a file
            test = evaluate_job(model, self.job, self.ranks.world)
            self.watch.lap("evaluate")
        self.journal.evaluation("large_batch", test)
        for line in self.averages:
            self.journal.add("world", line)
        save_model(model, self.out / "large_batch.safetensors", self.job.header, self.ranks.world)
        self._meet(self.control.stop)

    @property
    def _averages(self) -> Path:
        return self.checkpoints.folder / "averages.json"

    def _saved_averages(self) -> list[Line]:
        """The evaluations of the averaged model at the groups' meetings so far."""
        try:
            return json.loads(self._averages.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read {self._averages}: {error}") from None
