"""Studies: the rows of a table, run one after the other, as a TOML file names them. Imports neither torch nor MPI."""

import ctypes
import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from swap_hpc.errors import Diverged, RunError, Stopped, UserError
from swap_hpc.parallel.launcher import launch_line
from swap_hpc.recipe.loading import differing_fields, load_recipe, one_line, read_toml
from swap_hpc.recipe.schema import Count, Recipe, Section, on_disk
from swap_hpc.run.checks import check_ranks

SHIPPED = Path(__file__).parent


PR_SET_PDEATHSIG = 1  # of prctl(2)

Model = Literal[
    "large_batch", "mean_of_groups", "averaged"
]  # whose figure a row shows: keys of `result.json`


Argument = Annotated[
    str, AfterValidator(on_disk)
]  # as the command line would give it, in any locale


class Run(Section, populate_by_name=True):
    """What is trained, once per seed."""

    recipe: Argument | None = None  # else the study's
    ranks: Count | None = None  # else the study's
    overrides: Annotated[
        tuple[Argument, ...], Field(alias="set")
    ] = ()  # as `train --set` takes them; {rate} stands for the chosen rate
    phase_1_of: Annotated[str | None, Field(alias="from")] = (
        None  # another run, whose phase 1, of the same seed, is this one's
    )
    rates: tuple[float, ...] = ()  # searched, where there are several
    search_overrides: Annotated[
        tuple[Argument, ...], Field(alias="search_set")
    ] = ()  # of the search's trials alone


class Row(Section):
    """A line of the table."""

    method: str
    run: str
    model: Model = "averaged"


class Search(Section, populate_by_name=True):
    """How the rates are chosen: trials on other seeds, evaluated on samples that the reported runs train on."""

    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    overrides: Annotated[tuple[Argument, ...], Field(alias="set")] = ()


class Study(Section, populate_by_name=True):
    title: str
    recipe: Argument
    ranks: Count
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    overrides: Annotated[tuple[Argument, ...], Field(alias="set")] = ()
    note: str = ""  # printed below the table
    search: Search | None = None
    runs: dict[str, Run]
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]
    differences: tuple[
        tuple[str, str], ...
    ] = ()  # pairs of methods, the first one's accuracy less the second one's

    @model_validator(mode="after")
    def _names_are_known(self) -> "Study":
        named = [row.run for row in self.rows] + [
            run.phase_1_of for run in self.runs.values() if run.phase_1_of
        ]
        methods = [row.method for row in self.rows]
        for wanted, known in (
            (named, [*self.runs]),
            ([m for pair in self.differences for m in pair], methods),
        ):
            if unknown := sorted(set(wanted) - set(known)):
                raise ValueError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        for name, run in self.runs.items():
            if bool(run.rates) != any("{rate}" in override for override in run.overrides):
                raise ValueError(f"runs.{name}: rates and a {{rate}} in its set go together")
            if len(run.rates) > 1 and not self.search:
                raise ValueError(
                    f"runs.{name} has several rates: a [search] chooses one, with seeds of its own"
                )
            if run.phase_1_of and [*self.runs].index(run.phase_1_of) >= [*self.runs].index(name):
                raise ValueError(
                    f"runs.{name} goes on from {run.phase_1_of}, which has to stand before it"
                )
            if run.phase_1_of and ((first := self.runs[run.phase_1_of]).rates or first.phase_1_of):
                raise ValueError(
                    f"runs.{name} goes on from {run.phase_1_of}, which may have neither rates nor a from of its own"
                )
        if self.search and set(self.search.seeds) & set(self.seeds):
            raise ValueError("search.seeds and seeds have to differ")
        return self


@dataclass(frozen=True)
class Trial:
    """One run of the program."""

    folder: Path
    name: str  # of what is run
    recipe: Recipe
    ranks: int
    line: tuple[str, ...]  # for `swap-hpc`
    rate: float | None = None

    @property
    def result(self) -> dict[str, Any] | None:
        """What it ended with; None where it has not. Raises UserError where its folder holds another recipe's run."""
        file = self.folder / "recipe.toml"
        if file.is_file() and (differing := differing_fields(self.recipe, load_recipe(str(file)))):
            raise UserError(
                f"{self.folder} holds a run of another recipe ({', '.join(differing)} differ): choose another --out, or remove the folder"
            )
        try:
            result = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        # phase 1 of a run that began with another's was trained there; refine_ranks may be none
        told = (
            result.get("refine_ranks")
            if self.recipe.refine.epochs or "--from" in self.line
            else result["ranks"]
        )
        if (told or self.ranks) != self.ranks:
            raise UserError(
                f"{self.folder} holds a run on {told} ranks, not {self.ranks}: choose another --out, or remove it"
            )
        return result

    @property
    def diverged(self) -> bool:
        """Whether it ended at a loss that was not finite."""
        return (self.folder / Diverged.FILE).is_file()


def shipped_studies() -> dict[str, Path]:
    """Name -> file of the studies that come with the package."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def load_study(name: str) -> Study:
    """The study `name`, a shipped one's name or a path. Raises UserError, in one line."""
    path = shipped_studies().get(name, Path(name))
    if not path.is_file():
        raise UserError(
            f"no study {name!r}: neither a file nor one of {', '.join(shipped_studies())}"
        )
    try:
        return Study.model_validate(read_toml(path))
    except ValidationError as error:
        raise UserError(
            f"{path}: " + "; ".join(one_line(each, Study) for each in error.errors())
        ) from None


@dataclass(frozen=True)
class Plan:
    """A study into a folder: which runs it takes."""

    study: Study
    out: Path
    data: Path | None = None
    overrides: tuple[str, ...] = ()  # the user's, after all others

    def trials(self) -> list[Trial]:
        """Of the search, all of them; what needs no rate once per seed."""
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
        """The runs of the table, seed by seed. Needs the search's results."""
        return [
            self._trial(name, seed, self.rate(name), None)
            for seed in self.study.seeds
            for name in self.study.runs
        ]

    def rate(self, name: str) -> float | None:
        """The rate that a run takes: the only one, or the one whose trials had the highest mean accuracy. RunError before they are done."""
        rates = self.study.runs[name].rates
        if len(rates) < 2:
            return rates[0] if rates else None
        best = max(rates, key=lambda rate: self.accuracy(name, rate))
        if self.accuracy(name, best) == -math.inf:
            raise UserError(f"{name}: every rate of the search diverged: give it lower ones")
        return best

    def accuracy(self, name: str, rate: float) -> float:
        """Mean of a run's trials at a rate, on validation samples; minus infinity where one diverged. RunError before they are done."""
        return mean(self._accuracies(name, rate))

    def _accuracies(self, name: str, rate: float) -> Iterator[float]:
        for trial in self.trials():
            if (trial.name, trial.rate) == (name, rate):
                result = trial.result
                if result is None and not trial.diverged:
                    raise RunError(f"{trial.folder}: this trial of the search has not ended")
                yield judged(result) if result else -math.inf

    def check(self) -> None:
        """Raises UserError for whatever of the study cannot run, before anything does."""
        for name, run in self.study.runs.items():
            trial = self._trial(
                name, self.study.seeds[0], run.rates[0] if run.rates else None, None
            )
            check_ranks(trial.recipe, trial.ranks, phase_1_is_over="--from" in trial.line)
            for row in self.study.rows:
                if (
                    row.run == name
                    and row.model != "large_batch"
                    and not trial.recipe.refine.epochs
                ):
                    raise UserError(
                        f'the row "{row.method}" shows the {row.model} model of {name}, which refines none: model = "large_batch"'
                    )
        for trial in self.trials():
            check_ranks(trial.recipe, trial.ranks, phase_1_is_over="--from" in trial.line)
            if not trial.recipe.data.validation:
                raise UserError(
                    "the search would choose rates on test images: put data.validation=5000, say, into search.set"
                )

    def _trial(self, name: str, seed: int, rate: float | None, search: Search | None) -> Trial:
        study, run = self.study, self.study.runs[name]
        overrides = [
            *study.overrides,
            *(each.replace("{rate}", str(rate)) for each in run.overrides),
            f"seed={seed}",
        ]
        if search:
            overrides += [*search.overrides, *run.search_overrides]
        overrides += self.overrides
        source = run.recipe or study.recipe
        folder = self._folder(name, seed, rate, search)
        line = [
            "train",
            source,
            "--out",
            str(folder),
            *(part for override in overrides for part in ("--set", override)),
        ]
        line += ["--data", str(self.data)] if self.data else []
        if run.phase_1_of:
            line += ["--from", str(self._folder(run.phase_1_of, seed, None, search))]
        return Trial(
            folder,
            name,
            load_recipe(source, overrides, self.data),
            run.ranks or study.ranks,
            tuple(line),
            rate,
        )

    def _folder(self, name: str, seed: int, rate: float | None, search: Search | None) -> Path:
        if not search:
            return self.out / on_disk(name) / f"seed-{seed}"
        return (
            self.out
            / "search"
            / on_disk(name)
            / (f"rate-{rate:g}-seed-{seed}" if rate is not None else f"seed-{seed}")
        )


def judged(result: dict[str, Any]) -> float:
    """The accuracy of the model that a run ends with."""
    accuracy = result["test_accuracy"]
    return accuracy["averaged"] if accuracy["averaged"] is not None else accuracy["large_batch"]


@dataclass
class _Stop:
    """What signals ask of a study."""

    asked: bool = False
    process: subprocess.Popen[bytes] | None = None  # the trial under way

    def ask(self, *_: object) -> None:
        self.asked = True
        if self.process:
            self.process.send_signal(signal.SIGUSR1)  # which lets it save


@contextmanager
def _stops() -> Iterator[_Stop]:
    stop = _Stop()
    asking = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, stop.ask) for number in asking}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def carry_out(trials: Sequence[Trial], launcher: str, what: str) -> Iterator[Trial]:
    """Runs what is not complete yet, one after the other, and yields each at its end. Raises RunError, UserError, Stopped.

    A trial with a rate to be judged may diverge; any other trial that does ends the study.
    """
    with _stops() as stop:
        for number, trial in enumerate(trials, 1):
            if trial.result is None and not (what == "search" and trial.diverged):
                rate = f", rate {trial.rate:g}" if trial.rate is not None else ""
                print(
                    f"\n{what} {number} of {len(trials)}: {trial.name}, seed {trial.recipe.seed}{rate}",
                    flush=True,
                )
                code = _launch(trial, launcher, stop)
                if code and not (what == "search" and trial.rate is not None and trial.diverged):
                    error = UserError if code == 2 else RunError
                    raise error(
                        f"the study ends at {trial.folder} (exit code {code}, see above): start it again to go on"
                    )
                if not code and trial.result is None:  # a launcher that lost a node may not say so
                    raise RunError(
                        f"the study ends at {trial.folder}, which ended without a result: start it again to go on"
                    )
            yield trial
            if stop.asked:
                raise Stopped(
                    "the study was stopped on request, all is saved: start it again to go on"
                )


def _launch(trial: Trial, launcher: str, stop: _Stop) -> int:
    """The trial's exit code. Raises Stopped where it was asked to stop before its end."""
    start = launch_line(launcher, trial.ranks)
    line = [*start, sys.executable, "-m", "swap_hpc", *trial.line]
    # in a session of its own, so that a terminal's signal reaches it by us alone, as one that lets it save
    stop.process = subprocess.Popen(line, start_new_session=True, preexec_fn=_end_with_the_study)
    if stop.asked:  # while it was being started
        stop.ask()
    code = stop.process.wait()
    stop.process = None
    if code == 75 or (
        stop.asked and (code or trial.result is None)
    ):  # MPICH's mpirun may say 0 after a stop
        raise Stopped("the study was stopped on request, all is saved: start it again to go on")
    return code


def _end_with_the_study() -> None:
    """Lets the launcher end where the study is killed, so that no second one finds it at work."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
