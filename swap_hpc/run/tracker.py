"""A run's metrics in Weights & Biases or MLflow, made from the same lines as the JSON files."""

import json
import os
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from swap_hpc.errors import UserError
from swap_hpc.parallel.atomic import write_json
from swap_hpc.recipe.loading import flat
from swap_hpc.recipe.schema import Recipe
from swap_hpc.recipe.wording import shortened
from swap_hpc.run.board import point_of
from swap_hpc.run.lines import Line

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}  # what pip installs

FOLDER = "tracking"  # in the run's folder: what each curve is called in the service


def check_tracker(recipe: Recipe) -> None:
    """Check that the library of a recipe's tracker is installed.

    Raises:
        UserError: it is not.
    """
    tracker = recipe.tracker
    if tracker and not find_spec(tracker):
        raise UserError(
            f'tracker = "{tracker}", but {tracker} is not installed: pip install '
            f"{PACKAGES[tracker]}, or --set tracker="
        )


class Service(Protocol):
    """Where curves are kept, each by an id that the service knows it by."""

    def begin(self, curve: str, known: str | None) -> str:
        """Begin a curve, or continue the one that is known by an id, and return its id."""

    def log(self, curve: str, values: Mapping[str, float], epoch: int) -> None:
        """Add a point to a curve that has begun."""

    def end(self) -> None:
        """Tell the service that the curves are complete."""


@dataclass
class Tracker:
    """Sends a run's curves to a service: one for each part, and one for the average.

    The first rank of a part's team sends that part's. What it has sent is noted in the run's
    folder, so that a resumed run continues the same curves. Where the service fails, the run goes
    on without it, after one warning.
    """

    out: Path
    recipe: Recipe
    service: Service
    has_failed: bool = False
    ids: dict[str, str] = field(default_factory=dict)  # curve -> its id
    last: dict[str, int] = field(default_factory=dict)  # curve -> the last epoch that was sent

    def begin(self, part: str, lines: Sequence[Line], first: int) -> None:
        """Send those lines of a part that were not sent yet; see `Board.begin`."""
        for line in lines:
            self.add(part, line, first)

    def add(self, part: str, line: Line, first: int) -> None:
        """Send a line of a part; see `Board.begin`."""
        point = point_of(part, line, first, self.recipe)
        if self.has_failed or point is None:
            return
        try:
            self._send(point.curve, point.values, point.epoch)
        except Exception as error:  # a library of a network service may raise anything
            self._warn(error)

    def end(self) -> None:
        if self.has_failed or not self.ids:
            return
        try:
            self.service.end()
        except Exception as error:
            self._warn(error)

    def _send(self, curve: str, values: Mapping[str, float], epoch: int) -> None:
        note = self.out / FOLDER / f"{curve}.json"
        if curve not in self.ids:
            known: dict[str, Any] = {}
            with suppress(FileNotFoundError):
                known = json.loads(note.read_text(encoding="utf-8"))
            # an id of another service means nothing to this one
            same = known if known.get("tracker") == self.recipe.tracker else {}
            self.ids[curve] = self.service.begin(curve, same.get("id"))
            self.last[curve] = same.get("epoch", -1)
        if epoch <= self.last[curve]:
            return
        self.service.log(curve, values, epoch)
        self.last[curve] = epoch
        facts = {"tracker": self.recipe.tracker, "id": self.ids[curve], "epoch": epoch}
        write_json(note, facts)

    def _warn(self, error: Exception) -> None:
        self.has_failed = True
        reason = shortened(f"{type(error).__name__}: {error}", 300)
        print(
            f"swap-hpc: warning: {self.recipe.tracker} failed ({reason}): "
            "the run goes on without it, its metrics are in its folder",
            file=sys.stderr,
            flush=True,
        )


def tracker_of(recipe: Recipe, out: Path) -> Tracker | None:
    """Return the tracker that a recipe asks for. Nothing is imported or sent yet."""
    if recipe.tracker is None:
        return None
    is_wandb = recipe.tracker == "wandb"
    service = WeightsAndBiases(recipe, out) if is_wandb else MLflow(recipe, out)
    return Tracker(out, recipe, service)


@dataclass
class WeightsAndBiases:
    """Each curve is a W&B run; those of a run of ours are a W&B group."""

    recipe: Recipe
    out: Path
    runs: dict[str, Any] = field(default_factory=dict)

    def begin(self, curve: str, known: str | None) -> str:
        import wandb

        chosen = known or uuid.uuid4().hex[:8]
        self.runs[curve] = wandb.init(
            project=os.environ.get("WANDB_PROJECT", self.recipe.name),
            group=os.environ.get("WANDB_RUN_GROUP", self.out.name),
            name=f"{self.out.name} {curve}",
            id=chosen,
            resume="allow",
            reinit="create_new",  # a rank may have several curves
            dir=str(self.out),
            config=self.recipe.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True),
        )
        return chosen

    def log(self, curve: str, values: Mapping[str, float], epoch: int) -> None:
        self.runs[curve].log(dict(values), step=epoch)

    def end(self) -> None:
        for run in self.runs.values():
            run.finish()
        self.runs.clear()


@dataclass
class MLflow:
    """Each curve is an MLflow run, with the recipe as its parameters, in one experiment."""

    recipe: Recipe
    out: Path
    runs: dict[str, str] = field(default_factory=dict)

    def begin(self, curve: str, known: str | None) -> str:
        from mlflow.entities import Param

        client = self._client()
        if known is None:
            run = client.create_run(self._experiment(), run_name=f"{self.out.name} {curve}")
            known = run.info.run_id
            fields = flat(self.recipe.model_dump(mode="json", exclude_none=True))
            params = [Param(name, str(value)[:500]) for name, value in fields.items()]
            client.log_batch(known, params=params)
        self.runs[curve] = known
        return known

    def log(self, curve: str, values: Mapping[str, float], epoch: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, epoch) for name, value in values.items()]
        self._client().log_batch(self.runs[curve], metrics=metrics)

    def end(self) -> None:
        for run in self.runs.values():
            self._client().set_terminated(run)
        self.runs.clear()

    def _client(self) -> Any:
        # MLflow's own would let all ranks wait for minutes where a server does not answer.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient

        return MlflowClient()

    def _experiment(self) -> str:
        client = self._client()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", self.recipe.name)
        # Another rank may make it at the same time: then it is there when this one looks again.
        found = client.get_experiment_by_name(name)
        if found is None:
            with suppress(Exception):
                client.create_experiment(name)
            found = client.get_experiment_by_name(name)
        if found is None:
            raise RuntimeError(f"no experiment {name}, and none can be made")
        identity: str = found.experiment_id
        return identity
