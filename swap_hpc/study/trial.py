"""One training run of a study: its folder, what it found, and what it must satisfy.

Imports neither torch nor MPI.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from swap_hpc.errors import Diverged, UserError
from swap_hpc.parallel.atomic import write_json
from swap_hpc.recipe.loading import differing_fields, load_recipe
from swap_hpc.recipe.schema import Recipe
from swap_hpc.run.checks import check_ranks
from swap_hpc.run.folder import holds_weights

NETWORK = "network.json"


class Network(NamedTuple):
    """A network over which runs are compared."""

    name: str
    """What stands for `{network}` in the launcher."""
    megabits: float
    """The rate of a rank's link, Mbit/s."""


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
    network: Network | None = None
    """The network that the launcher takes; None where there is one."""
    is_timed: bool = True
    """False: its seconds are not told, and any network serves."""

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
        self.check_network()
        ranks = self._ranks_in(result)
        if ranks != self.ranks:
            raise UserError(
                f"{self.folder} holds a run on {ranks} rank{'s' * (ranks != 1)}, "
                f"not {self.ranks}: choose another --out, or remove it"
            )
        return result

    def check_network(self) -> None:
        """Check that what the folder holds was run over this trial's network.

        Raises:
            UserError: it was another one, or none was named.
        """
        if self.network is None or not self.is_timed or self.ranks == 1:
            return
        if (found := self._recorded()) != self.network:
            over = f"over {found.name} ({found.megabits:g} Mbit/s)" if found else "over one network"
            raise UserError(
                f"{self.folder} holds a run {over}, not over {self.network.name} "
                f"({self.network.megabits:g} Mbit/s): choose another --out, or remove the folder"
            )

    def record_network(self) -> None:
        """Write the network into the folder, unless the folder holds a run already.

        Raises:
            UserError: what the folder holds was run over another network.
        """
        begun = holds_weights(self.folder) or (self.folder / "checkpoints").exists()
        if begun:
            self.check_network()
            self._check_that_no_other_goes_on()
        elif self.network is None:
            (self.folder / NETWORK).unlink(missing_ok=True)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / NETWORK, self.network._asdict())

    def _check_that_no_other_goes_on(self) -> None:
        """Check that a run which was begun over a network does not go on without."""
        found = self._recorded() if self.is_timed and self.ranks > 1 else None
        if found and self.network is None:
            raise UserError(
                f"{self.folder} was begun over {found.name}: let it go on over that network, by a "
                "--launcher with {network}, or remove the folder"
            )

    def _recorded(self) -> Network | None:
        try:
            return Network(**json.loads((self.folder / NETWORK).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

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


def check_ranks_of(trial: Trial) -> None:
    """Raise UserError for a trial whose recipe does not run on its ranks."""
    check_ranks(trial.recipe, trial.ranks, phase_1_is_over="--from" in trial.line)


def check_validation(trial: Trial) -> None:
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


def value_for_choice(trial: Trial, result: dict[str, Any], metric: str) -> float:
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
