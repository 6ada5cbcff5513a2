"""The plan of a study: which runs it takes, and what they found. Imports neither torch nor MPI."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from swap_hpc.errors import Diverged, RunError, UserError
from swap_hpc.recipe.loading import differing_fields, load_recipe
from swap_hpc.recipe.metrics import MetricChoice
from swap_hpc.recipe.schema import Recipe
from swap_hpc.recipe.values import on_disk
from swap_hpc.run.checks import check_ranks
from swap_hpc.run.folder import holds_weights
from swap_hpc.study.study import OF_PHASE_1, Search, Study


@dataclass(frozen=True)
class Trial:
    """One training run of a study."""

    folder: Path
    name: str
    """The key in the study's `runs`."""
    recipe: Recipe
    ranks: int
    line: tuple[str, ...]
    """Arguments for `swap-hpc`."""
    rate: float | None = None

    @property
    def result(self) -> dict[str, Any] | None:
        """What `result.json` holds; None before the run is complete.

        Raises:
            UserError: the folder holds a run of another recipe or on another number of ranks.
        """
        if holds_weights(self.folder) and (differing := self._differing()):
            raise UserError(
                f"{self.folder} holds a run of another recipe ({', '.join(differing)} differ): "
                "choose another --out, or remove the folder"
            )
        try:
            result = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        ranks = self._ranks_in(result)
        if ranks != self.ranks:
            raise UserError(
                f"{self.folder} holds a run on {ranks} rank{'s' * (ranks != 1)}, "
                f"not {self.ranks}: choose another --out, or remove it"
            )
        return result

    def _differing(self) -> list[str]:
        """Return the fields of the recipe in the folder that differ from those of the trial's."""
        file = self.folder / "recipe.toml"
        return differing_fields(self.recipe, load_recipe(str(file))) if file.is_file() else []

    def _ranks_in(self, result: dict[str, Any]) -> int:
        """Return the ranks that trained the run; those of this trial where none are recorded."""
        # `ranks` is about phase 1, which a run with --from takes from another one
        refined_here = self.recipe.refine.epochs or "--from" in self.line
        return result.get("refine_ranks" if refined_here else "ranks") or self.ranks

    @property
    def diverged(self) -> bool:
        """True if this run, and not one of another recipe, ended at a loss that is not finite."""
        return (self.folder / Diverged.FILE).is_file() and not self._differing()


@dataclass(frozen=True)
class Plan:
    """A study, the folder that it is run into, and the trials that this takes."""

    study: Study
    out: Path
    data: Path | None = None
    overrides: tuple[str, ...] = ()
    """The user's, which come after all others."""

    def trials(self) -> list[Trial]:
        """Return the search: runs with several rates at each of them, and what they begin with."""
        search = self.study.search
        if not search:
            return []
        searched = {name for name, run in self.study.runs.items() if len(run.rates) > 1}
        needed = searched | {self.study.runs[name].phase_1_of for name in searched}
        return [
            self._trial(name, seed, rate, search)
            for seed in search.seeds
            for name, run in self.study.runs.items()
            for rate in (run.rates or (None,))
            if name in needed
        ]

    def reported(self) -> list[Trial]:
        """Return the runs of the table, seed by seed; needs the search's results."""
        return [
            self._trial(name, seed, self.rate(name), None)
            for seed in self.study.seeds
            for name in self.study.runs
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
            row.run: self._trial(row.run, seed, self._any_rate(row.run), None).recipe.metrics[0]
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
            yield _value_for_choice(trial, result, self.metric.key) if result else worst

    def check(self) -> None:
        """Raise UserError for whatever in the study cannot run, before anything does."""
        _ = self.metric
        for name in self.study.runs:
            trial = self._trial(name, self.study.seeds[0], self._any_rate(name), None)
            _check_ranks(trial)
            self._check_rows(trial)
        for trial in self.trials():
            _check_ranks(trial)
            _check_validation(trial)

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

    def _trial(self, name: str, seed: int, rate: float | None, search: Search | None) -> Trial:
        """Return one run; `search` is None for a run of the table."""
        run = self.study.runs[name]
        overrides = self._overrides(name, seed, rate, search)
        source = run.recipe or self.study.recipe
        folder = self._folder(name, seed, rate, search)
        line = ["train", source, "--out", str(folder)]
        for override in overrides:
            line += ["--set", override]
        if self.data:
            line += ["--data", str(self.data)]
        if run.phase_1_of:
            line += ["--from", str(self._folder(run.phase_1_of, seed, None, search))]
        recipe = load_recipe(source, overrides, self.data)
        return Trial(folder, name, recipe, run.ranks or self.study.ranks, tuple(line), rate)

    def _overrides(
        self, name: str, seed: int, rate: float | None, search: Search | None
    ) -> list[str]:
        """Return the overrides of a run, the strongest last."""
        run = self.study.runs[name]
        filled = [override.replace("{rate}", str(rate)) for override in run.overrides]
        overrides = [*self.study.overrides, *filled, f"seed={seed}"]
        if search:
            overrides += [*search.overrides, *run.search_overrides]
        return [*overrides, *self.overrides]

    def _folder(self, name: str, seed: int, rate: float | None, search: Search | None) -> Path:
        if not search:
            return self.out / on_disk(name) / f"seed-{seed}"
        trial = f"seed-{seed}" if rate is None else f"rate-{rate:g}-seed-{seed}"
        return self.out / "search" / on_disk(name) / trial


def _check_ranks(trial: Trial) -> None:
    check_ranks(trial.recipe, trial.ranks, phase_1_is_over="--from" in trial.line)


def _check_validation(trial: Trial) -> None:
    """Raise UserError for a trial whose data have no validation split to choose a rate by.

    Shards, a folder and the data of a user's function may have one of their own.
    """
    data = trial.recipe.data
    has_own = ":" in data.name or (data.name in ("folder", "webdataset") and _has_val(data.path))
    if not data.validation and not has_own:
        raise UserError(
            "the search would choose rates on test samples: "
            "put data.validation=5000, say, into search.set"
        )


def _has_val(path: Path) -> bool:
    return (path / "val").is_dir() and (path / "test").is_dir()


def _value_for_choice(trial: Trial, result: dict[str, Any], metric: str) -> float:
    """Return a metric on validation samples of the model that a trial ends with.

    Raises:
        UserError: its data have no validation split.
    """
    found = result.get(f"validation_{metric}")
    if found is None and not trial.recipe.data.validation:
        raise UserError(
            f"{trial.folder}: the data have no validation split, and the search would choose on "
            "test samples: put data.validation=5000, say, into search.set"
        )
    # Runs of earlier versions report data.validation as their test split.
    found = found or result[f"test_{metric}"]
    return found["averaged"] if found["averaged"] is not None else found["large_batch"]
