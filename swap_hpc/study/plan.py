"""The plan of a study: which runs it takes, and what they found. Imports neither torch nor MPI."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from swap_hpc.errors import RunError, UserError
from swap_hpc.recipe.loading import differing_in_phase_1, load_recipe
from swap_hpc.recipe.metrics import MetricChoice
from swap_hpc.recipe.schema import Recipe
from swap_hpc.recipe.values import on_disk
from swap_hpc.study.study import OF_PHASE_1, Search, Study
from swap_hpc.study.trial import Network, Trial, check_ranks_of, check_validation, value_for_choice

TIMED = "timed"  # the folder of runs that are only timed
TIMED_RATE = 0.001  # the learning rate of runs that are only timed


class Which(NamedTuple):
    """Which run of a study: one of its table, a trial of its search, or one that is timed."""

    run: str
    """The key in the study's `runs`."""
    seed: int
    rate: float | None
    """What stands for `{rate}`."""
    search: Search | None = None
    """None for a run of the table."""
    timed_over: str | None = None
    """A network over which the run is only timed; None: it is complete."""


@dataclass(frozen=True)
class Plan:
    """A study, the folder that it is run into, and the trials that this takes."""

    study: Study
    out: Path
    data: Path | None = None
    overrides: tuple[str, ...] = ()
    """The user's, which come after all others."""
    networks: tuple[str, ...] = ()
    """Those of the study, where the launcher takes one; over the first, all runs are complete."""

    @property
    def timed_seeds(self) -> tuple[int, ...]:
        """The seeds whose runs' seconds are told."""
        return self.study.timed_seeds or self.study.seeds

    def for_report(self) -> "Plan":
        """Return the plan of what is told: with all networks as soon as runs were timed over them.

        So a call whose launcher takes no network does not leave out what earlier calls found.
        """
        if not (self.out / TIMED).is_dir():
            return self
        return replace(self, networks=tuple(self.study.networks))

    def trials(self) -> list[Trial]:
        """Return the search: runs with several rates at each of them, and what they begin with."""
        return [self._trial(which) for which in self._searched()]

    def _searched(self) -> list[Which]:
        search = self.study.search
        if not search:
            return []
        searched = {name for name, run in self.study.runs.items() if len(run.rates) > 1}
        needed = searched | {self.study.runs[name].phase_1_of for name in searched}
        return [
            Which(name, seed, rate, search)
            for seed in search.seeds
            for name, run in self.study.runs.items()
            for rate in (run.rates or (None,))
            if name in needed
        ]

    def reported(self, seeds: Collection[int] = ()) -> list[Trial]:
        """Return the runs of the table, seed by seed; needs the search's results.

        Args:
            seeds: some of the study's; empty: all of them.
        """
        return [
            self._trial(Which(name, seed, self.rate(name)))
            for seed in self.study.seeds
            if not seeds or seed in seeds
            for name in self.study.runs
        ]

    def reported_recipe(self, name: str) -> Recipe:
        """Return the recipe of a run of the table, with the first seed."""
        return self._trial(Which(name, self.study.seeds[0], self.rate(name))).recipe

    def timed(self, seeds: Collection[int] = ()) -> list[Trial]:
        """Return the short runs over all networks but the first; needs the search's results.

        A run on one rank takes as long over any network.

        Args:
            seeds: some of the study's, without whose first timed one there is none; empty: all.
        """
        seed = self.timed_seeds[0]
        if seeds and seed not in seeds:
            return []
        return [
            self._trial(Which(name, seed, self.rate(name), timed_over=network))
            for network in self.networks[1:]
            for name, run in self.study.runs.items()
            if (run.ranks or self.study.ranks) > 1
        ]

    def rate(self, name: str) -> float | None:
        """Return a run's rate: the only one, or the one with the best trials.

        Raises:
            RunError: a trial of the search is not complete.
            UserError: all of them diverged.
        """
        rates = self.study.runs[name].rates
        if len(rates) < 2:
            return rates[0] if rates else None
        best = rates[0]
        for rate in rates[1:]:
            if self.metric.better(self.found(name, rate), self.found(name, best)):
                best = rate
        if not math.isfinite(self.found(name, best)):
            raise UserError(f"{name}: every rate of the search diverged: give it lower ones")
        return best

    @cached_property
    def metric(self) -> MetricChoice:
        """The main metric of all rows.

        Raises:
            UserError: two rows have different ones.
        """
        seed = self.study.seeds[0]
        found = {
            row.run: self._trial(Which(row.run, seed, self._any_rate(row.run))).recipe.metrics[0]
            for row in self.study.rows
        }
        first, *others = found.values()
        if differing := [each for each in others if each != first]:
            raise UserError(
                f"the rows are measured by {first.key} and by {differing[0].key}: "
                "give all runs the same main metric, the first of metrics"
            )
        return first

    def _any_rate(self, name: str) -> float | None:
        rates = self.study.runs[name].rates
        return rates[0] if rates else None

    def found(self, name: str, rate: float) -> float:
        """Return the mean of the main metric over a run's trials at a rate, on validation samples.

        It is infinite, and worse than any other, if one of them diverged.

        Raises:
            RunError: a trial is not complete.
        """
        return mean(self._found(name, rate))

    def _found(self, name: str, rate: float) -> Iterator[float]:
        for trial in self.trials():
            if (trial.name, trial.rate) != (name, rate):
                continue
            result = trial.result
            if result is None and not trial.diverged:
                raise RunError(f"{trial.folder}: this trial of the search has not ended")
            worst = math.inf if self.metric.smaller_is_better else -math.inf
            yield value_for_choice(trial, result, self.metric.key) if result else worst

    def check(self) -> None:
        """Raise UserError for whatever in the study cannot run, before anything does."""
        _ = self.metric
        for name in self.study.runs:
            which = Which(name, self.study.seeds[0], self._any_rate(name))
            trial = self._trial(which)
            check_ranks_of(trial)
            self._check_rows(trial)
            self._check_phase_1(which, "differ: put them into the first set, for all runs")
        self._check_timed()
        for which in self._searched():
            trial = self._trial(which)
            check_ranks_of(trial)
            check_validation(trial)
            self._check_phase_1(which, "differ in the search: put them into search.set")

    def _check_phase_1(self, which: Which, complaint: str) -> None:
        """Raise UserError for a run that begins with a phase 1 that is not its own."""
        other = self.study.runs[which.run].phase_1_of
        if not other:
            return
        first = self._trial(which._replace(run=other, rate=None))
        if differing := differing_in_phase_1(self._trial(which).recipe, first.recipe):
            raise UserError(
                f"runs.{which.run} begins with phase 1 of {other}, but "
                f"{', '.join(differing)} {complaint}"
            )

    def _check_timed(self) -> None:
        """Raise UserError for what cannot be compared over several networks."""
        for name, run in self.study.runs.items() if len(self.networks) > 1 else ():
            which = Which(name, self.timed_seeds[0], self._any_rate(name))
            self._trial(which._replace(timed_over=self.networks[1]))
            first = self.study.runs[run.phase_1_of] if run.phase_1_of else run
            if (first.ranks or self.study.ranks) != (run.ranks or self.study.ranks):
                raise UserError(
                    f"runs.{name} begins with phase 1 of {run.phase_1_of}, on another number of "
                    "ranks: give both the same, since networks are compared"
                )

    def _check_rows(self, trial: Trial) -> None:
        """Raise UserError for a row that shows a model which its run does not make."""
        for row in self.study.rows:
            if row.run != trial.name:
                continue
            if row.model == "large_batch_ema" and trial.recipe.large_batch.ema is None:
                raise UserError(
                    f'the row "{row.method}" shows the moving average of phase 1 of {trial.name}, '
                    "which has none: set large_batch.ema"
                )
            if not trial.recipe.refine.epochs and row.model not in OF_PHASE_1:
                raise UserError(
                    f'the row "{row.method}" shows the {row.model} model of {trial.name}, '
                    'which has no refinement: write model = "large_batch"'
                )

    def _trial(self, which: Which) -> Trial:
        run = self.study.runs[which.run]
        overrides = self._overrides(which)
        source = run.recipe or self.study.recipe
        if which.timed_over is not None:
            overrides += self._shorter(load_recipe(source, overrides, self.data))
        folder = self._folder(which)
        line = ["train", source, "--out", str(folder)]
        for override in overrides:
            line += ["--set", override]
        if self.data:
            line += ["--data", str(self.data)]
        if run.phase_1_of:
            phase_1 = which._replace(run=run.phase_1_of, rate=None)
            line += ["--from", str(self._folder(phase_1))]
        network = which.timed_over or next(iter(self.networks), None)
        return Trial(
            folder,
            which.run,
            load_recipe(source, overrides, self.data),
            run.ranks or self.study.ranks,
            tuple(line),
            which.rate,
            Network(network, self.study.networks[network]) if network is not None else None,
            is_timed=not which.search and which.seed in self.timed_seeds,
        )

    def _overrides(self, which: Which) -> list[str]:
        """Return the overrides of a run, the strongest last."""
        run = self.study.runs[which.run]
        filled = [override.replace("{rate}", str(which.rate)) for override in run.overrides]
        overrides = [*self.study.overrides, *filled, f"seed={which.seed}"]
        if which.search:
            overrides += [*which.search.overrides, *run.search_overrides]
        return [*overrides, *self.overrides]

    def _shorter(self, recipe: Recipe) -> list[str]:
        """Return the overrides that let each phase of a run end after `timed_epochs`.

        The rates are constant: a schedule need not fit so few epochs, and seconds do not depend on
        them.
        """
        first, refine = recipe.large_batch.epochs, recipe.refine
        fields: dict[str, float] = {"large_batch.epochs": min(first, self.study.timed_epochs)}
        if first:
            fields["large_batch.learning_rate"] = TIMED_RATE
        if refine.epochs:
            epochs = min(refine.epochs * refine.cycles, self.study.timed_epochs)
            fields |= {
                "refine.epochs": epochs,
                "refine.cycles": 1,
                "refine.evaluate_average": min(refine.evaluate_average, epochs),
                "refine.learning_rate": TIMED_RATE,
            }
        return [f"{name}={value}" for name, value in fields.items()]

    def _folder(self, which: Which) -> Path:
        name = on_disk(which.run)
        if which.timed_over is not None:
            return self.out / TIMED / on_disk(which.timed_over) / name
        if not which.search:
            return self.out / name / f"seed-{which.seed}"
        rate = f"rate-{which.rate:g}-" if which.rate is not None else ""
        return self.out / "search" / name / f"{rate}seed-{which.seed}"
