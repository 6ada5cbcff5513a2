"""What a study is: the rows of a table and the runs behind them, as a TOML file describes them.

Imports neither torch nor MPI.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from swap_hpc.errors import UserError
from swap_hpc.recipe.complaints import complaints
from swap_hpc.recipe.loading import read_toml
from swap_hpc.recipe.section import Section
from swap_hpc.recipe.values import Count, on_disk

SHIPPED = Path(__file__).parent

# The models that a row may show: keys of `test_accuracy` in `result.json`.
Model = Literal["large_batch", "large_batch_ema", "mean_of_groups", "averaged"]
OF_PHASE_1 = ("large_batch", "large_batch_ema")

# A text in the bytes of the command line, whatever the locale.
Argument = Annotated[str, AfterValidator(on_disk)]

Arguments = tuple[Argument, ...]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Run(Section, populate_by_name=True):
    """A training run, repeated for each seed."""

    recipe: Argument | None = None
    """Recipe of this run. None: the study's."""
    ranks: Count | None = None
    """Ranks of this run. None: the study's."""
    overrides: Annotated[Arguments, Field(alias="set")] = ()
    """Fields as `train --set` takes them; `{rate}` stands for the chosen rate."""
    phase_1_of: Annotated[str | None, Field(alias="from")] = None
    """Another run; this one begins with its phase 1 of the same seed."""
    rates: tuple[float, ...] = ()
    """Values for `{rate}`; the search chooses one of several."""
    search_overrides: Annotated[Arguments, Field(alias="search_set")] = ()
    """Further overrides of the trials of the search."""


class Row(Section):
    """A line of the table."""

    method: str
    """Name of the line, as the table shows it and `differences` call it."""
    run: str
    """The run under `[runs.NAME]` whose models are shown."""
    model: Model = "averaged"
    """The model that is shown: the end of phase 1, its moving average along the phase, the mean of
    the groups' own results, or the averaged model."""


class Search(Section, populate_by_name=True):
    """The choice of rates: trials with other seeds, evaluated on samples that are held out."""

    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    """Seeds of the trials; none of the study's own."""
    overrides: Annotated[Arguments, Field(alias="set")] = ()
    """Fields of all trials, as `train --set` takes them, such as `data.validation=5000`."""


class Study(Section, populate_by_name=True):
    """A table, and the runs that fill it."""

    title: str
    """Heading of the table."""
    recipe: Argument
    """Recipe of all runs: a shipped one's name, or a TOML file."""
    ranks: Count
    """Ranks of all runs."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    """Seeds with which each run is repeated."""
    timed_seeds: tuple[int, ...] = ()
    """Seeds whose runs' seconds are told: these run on one machine that nothing else uses. Runs of
    the others show their metrics only, and may run anywhere. Empty: all seeds."""
    overrides: Annotated[Arguments, Field(alias="set")] = ()
    """Fields of all runs, as `train --set` takes them."""
    networks: Annotated[dict[Argument, Rate], Field(default_factory=dict)]
    """Networks that are compared: the text for `{network}` in `--launcher`, and the rate of a
    rank's link, Mbit/s. Over the first one all runs are complete. Over the others a run lasts for
    `timed_epochs` in each phase, which tells what the seconds of all epochs would be."""
    timed_epochs: Annotated[int, Field(ge=2)] = 4
    """Epochs of each phase that are timed over a further network; the first one does not count."""
    note: str = ""
    """A text below the table."""
    search: Search | None = None
    """The choice of rates, where a run has several. None: no run has."""
    runs: dict[str, Run]
    """The runs, each as a table `[runs.NAME]`."""
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]
    """The lines of the table, each as `[[rows]]`."""
    differences: tuple[tuple[str, str], ...] = ()
    """Pairs of methods; the table shows the first one's accuracy less the second one's."""

    @model_validator(mode="after")
    def _names_are_known(self) -> "Study":
        named = [row.run for row in self.rows]
        named += [run.phase_1_of for run in self.runs.values() if run.phase_1_of]
        _check_known(named, [*self.runs])
        compared = [method for pair in self.differences for method in pair]
        _check_known(compared, [row.method for row in self.rows])
        return self

    @model_validator(mode="after")
    def _rates_are_used(self) -> "Study":
        for name, run in self.runs.items():
            placeholder = any("{rate}" in override for override in run.overrides)
            if bool(run.rates) != placeholder:
                raise ValueError(f"runs.{name}: rates and a {{rate}} in its set go together")
            if len(run.rates) > 1 and not self.search:
                raise ValueError(
                    f"runs.{name} has several rates: a [search] with other seeds chooses one"
                )
        return self

    @model_validator(mode="after")
    def _phase_1_comes_first(self) -> "Study":
        order = [*self.runs]
        for name, run in self.runs.items():
            if not run.phase_1_of:
                continue
            begins = f"runs.{name} begins with phase 1 of {run.phase_1_of}"
            if order.index(run.phase_1_of) >= order.index(name):
                raise ValueError(f"{begins}, which must be listed before it")
            first = self.runs[run.phase_1_of]
            if first.rates or first.phase_1_of:
                raise ValueError(f"{begins}, which must have neither rates nor from")
        return self

    @model_validator(mode="after")
    def _timed_seeds_are_seeds(self) -> "Study":
        if not set(self.timed_seeds) <= set(self.seeds):
            raise ValueError("timed_seeds must be among seeds")
        return self

    @model_validator(mode="after")
    def _search_has_other_seeds(self) -> "Study":
        if self.search and set(self.search.seeds) & set(self.seeds):
            raise ValueError("search.seeds and seeds must not share a seed")
        return self


def _check_known(names: Iterable[str], known: list[str]) -> None:
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"{', '.join(unknown)}: not among {', '.join(known)}")


def check_seeds(study: Study, seeds: Iterable[int]) -> None:
    """Raise UserError for a seed that is not among those of a study's table."""
    if unknown := sorted(set(seeds) - set(study.seeds)):
        known = ", ".join(map(str, study.seeds))
        raise UserError(f"--seed {unknown[0]}: the study's seeds are {known}: choose of them")


def shipped_studies() -> dict[str, Path]:
    """Return the files of the studies that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def load_study(name: str) -> Study:
    """Read a study.

    Args:
        name: a shipped study's name, or the path of a TOML file.

    Raises:
        UserError: there is no such study, or the file is wrong.
    """
    path = shipped_studies().get(name, Path(name))
    if not path.is_file():
        known = ", ".join(shipped_studies())
        raise UserError(f"no study {name!r}: neither a file nor one of {known}")
    try:
        return Study.model_validate(read_toml(path))
    except ValidationError as error:
        raise UserError(f"{path}: {complaints(error, Study)}") from None
