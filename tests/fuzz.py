"""Whole runs of models that mix everything a module may hold: each must be right or refused.

    python tests/fuzz.py [--models 300] [--seed 0] [--only INGREDIENT[,INGREDIENT]]

Each model is trained twice on two ranks, in two groups: without a stop, and with a few stops. Both
runs must leave the same files bit for bit, equal to what `fuzz_check.py` computes from the groups'
files with plain torch. Models that cannot be trained right must be refused in one line, before any
training.
"""

import argparse
import io
import json
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from unittest.mock import patch

from launch import command

if TYPE_CHECKING:  # the process that starts the ranks needs neither torch nor MPI
    from swap_hpc.parallel.teams import Team
    from swap_hpc.recipe.phase import Part
    from swap_hpc.recipe.schema import Recipe
    from swap_hpc.train.control import Control

# Models for each start of the ranks. Importing torch is what costs, but every run leaks
# communicators, of which an MPI has only so many.
PER_START = 30
SECONDS = 10  # per model, before the ranks count as hung
PATIENCE = 15  # seconds that a rank with an error waits for the others
STARTS = 4  # starts of a stopped run, at most; the last one is not stopped
HEARTBEATS = 40  # a whole run has a few more: steps, batches and saves

T = TypeVar("T")


@dataclass(frozen=True)
class Verdict:
    """The judgement on a seed's model."""

    seed: int
    ingredients: tuple[str, ...]
    word: str  # "right", "refused" or "wrong"
    why: tuple[str, ...]  # what is wrong; a refusal's line
    seconds: float

    def __str__(self) -> str:
        made_of = ", ".join(self.ingredients)
        head = f"seed {self.seed:<5} {self.word:<7} {self.seconds:5.1f} s  {made_of}"
        return "\n    ".join([head, *self.why])


def summary(verdicts: list[Verdict]) -> str:
    words = [verdict.word for verdict in verdicts]
    counts = [f"{words.count(word)} {word}" for word in ("right", "refused", "wrong")]
    return f"{len(words)} models: {', '.join(counts)}"


# The process that starts the ranks


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first model")
    parser.add_argument("--only", default="", help="ingredients of all models, separated by commas")
    parser.add_argument("--ranks", type=Path, help="run as a rank, with this file for verdicts")
    given = parser.parse_args()
    seeds = range(given.seed, given.seed + given.models)
    if given.ranks:
        judge_all(seeds, given.only, given.ranks)
        return
    verdicts = []
    for verdict in from_ranks(seeds, given.only):
        print(verdict, flush=True)
        verdicts.append(verdict)
    print(f"\n{summary(verdicts)}")
    sys.exit(any(verdict.word == "wrong" for verdict in verdicts))


def from_ranks(seeds: range, only: str) -> Iterator[Verdict]:
    """Judge models on two ranks, which are started anew when a model has ended or hung them."""
    while seeds:
        verdicts = start_ranks(seeds[:PER_START], only)
        yield from verdicts
        seeds = seeds[len(verdicts) :]


def start_ranks(seeds: range, only: str) -> list[Verdict]:
    """Return the verdicts of one `mpirun`, at least one.

    Where the ranks ended early, the last verdict says how.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "verdicts.jsonl"
        wanted = ["--models", str(len(seeds)), "--seed", str(seeds[0]), f"--only={only}"]
        line: list[str | Path] = [sys.executable, __file__, *wanted, "--ranks", file]
        timeout = 60 + SECONDS * len(seeds)
        try:
            done = command(*line, ranks=2, timeout=timeout, variables={"OMP_NUM_THREADS": "1"})
            errors = done.stderr.partition("\n-----")[0].strip("\n\0")  # without mpirun's banner
            end = f"the ranks ended with {done.code}: {errors[-2000:]}"
        except AssertionError as hung:
            end = str(hung)
        lines = file.read_text().splitlines() if file.exists() else []
    verdicts = [Verdict(**json.loads(line)) for line in lines]
    if len(verdicts) < len(seeds):
        seed, seconds = seeds[len(verdicts)], time.monotonic() - begin
        verdicts.append(Verdict(seed, ingredients_of(seed, only), "wrong", (end,), seconds))
    return verdicts


def ingredients_of(seed: int, only: str) -> tuple[str, ...]:
    import fuzz_models

    return fuzz_models.ingredients(seed, only)


# A rank


def judge_all(seeds: range, only: str, file: Path) -> None:
    """Judge models on all ranks; the first rank writes a line for each verdict."""
    from swap_hpc.parallel.teams import Team

    world = Team.world()
    with tempfile.TemporaryDirectory() as own:
        folder = Path(world.broadcast(own))
        for seed in seeds:
            verdict = judge(seed, only, folder, world)
            if world.rank == 0:
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(asdict(verdict)) + "\n")
        world.barrier()


def judge(seed: int, only: str, folder: Path, world: "Team") -> Verdict:
    """Return the verdict on a seed's model, the same on all ranks.

    Args:
        seed: chooses the model.
        only: ingredients of the model, separated by commas, instead of the seed's.
        folder: one folder for all ranks.
        world: all ranks.
    """
    import fuzz_models

    begin = time.monotonic()
    names = fuzz_models.ingredients(seed, only)
    run = folder / f"seed-{seed}"
    with patched(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of old functions that models still use
        if names[0] in fuzz_models.REFUSED:
            refusal, wrong = refused(recipe(seed, only), names[0], run, world)
        else:
            refusal, wrong = "", trained(recipe(seed, only), seed, run, world)
    world.barrier()
    if world.rank == 0:
        shutil.rmtree(run, ignore_errors=True)
    seconds = time.monotonic() - begin
    if wrong:
        return Verdict(seed, names, "wrong", tuple(wrong), seconds)
    if refusal:
        return Verdict(seed, names, "refused", (refusal,), seconds)
    return Verdict(seed, names, "right", (), seconds)


def recipe(seed: int, only: str) -> "Recipe":
    """Return a recipe of two groups: 2 epochs of 2 steps, then 2 of 3 steps.

    Batch norm is estimated on one batch, so that plain torch can do the same.
    """
    import fuzz_models

    from swap_hpc.recipe.loading import parse

    return parse(
        {
            "seed": seed,
            "groups": 2,
            "device": "cpu",
            "model": {"name": "fuzz_models:build", "seed": seed, "only": only},
            "data": {"name": "fuzz_models:data"},
            "optimizer": {"weight_decay": 0.0},
            "large_batch": {"batch_size": 48, "epochs": 2, "learning_rate": 0.05},
            "refine": {"batch_size": 32, "epochs": 2, "learning_rate": 0.05},
            "batchnorm": {"batch_size": fuzz_models.TRAIN},
            "evaluate": {"batch_size": fuzz_models.TEST},
            "watchdog": {"minutes": 0.5},
        }
    )


def refused(recipe: "Recipe", name: str, run: Path, world: "Team") -> tuple[str, list[str]]:
    """Return the line of the refusal, and what is wrong with it."""
    import fuzz_models

    done = attempt(lambda: train(recipe, run, world), world)
    if done.kind != "UserError":
        return "", [f"not refused, but: {done.error or 'trained'}"]
    wrong = []
    if "\n" in done.error:
        wrong.append(f"more than a line: {done.error}")
    if not re.search(fuzz_models.REFUSED[name].cause, done.error, re.IGNORECASE):
        wrong.append(f"does not name the cause: {done.error}")
    if left := [path.name for path in run.rglob("*.safetensors")]:
        wrong.append(f"refused after it wrote {left}: {done.error}")
    return done.error, wrong


def trained(recipe: "Recipe", seed: int, run: Path, world: "Team") -> list[str]:
    """Return what is wrong with the runs of a model that has to be trained right."""
    whole = attempt(lambda: train(recipe, run / "whole", world), world)
    if whole.error:
        return [whole.error]
    assert whole.value
    wrong = checked(recipe, seed, run / "whole", whole.value, world)
    wrong += evaluated(run / "whole", whole.value, world)
    places: list[str] = []
    again = attempt(lambda: train_with_stops(recipe, run / "stopped", world, seed, places), world)
    if again.error:
        return [*wrong, f"stopped at {places}: {again.error}"]
    wrong += [f"stopped at {places}: {each}" for each in differing(run / "whole", run / "stopped")]
    return wrong


def checked(
    recipe: "Recipe",
    seed: int,
    out: Path,
    result: dict[str, Any],
    world: "Team",
) -> list[str]:
    """Return what plain torch, on the first rank, finds wrong in a run's files."""
    import fuzz_check
    import fuzz_models
    import torch

    def wrong() -> list[str]:
        torch.manual_seed(recipe.seed)
        model = fuzz_models.build(fuzz_models.CLASSES, 1, seed, recipe.model.arguments["only"])
        return fuzz_check.wrong_in(out, model, result["test_accuracy"]["averaged"])

    done = attempt(wrong if world.rank == 0 else list, world)
    return [f"the check failed: {done.error}"] if done.error else world.broadcast(done.value or [])


def evaluated(out: Path, result: dict[str, Any], world: "Team") -> list[str]:
    """Return where the saved files give another average or accuracy than the run did."""
    from swap_hpc.run import saved

    wrong = []
    average = attempt(lambda: saved.average(out, None, None, world), world)
    if average.error or not average.value:
        wrong.append(f"average: {average.error}")
    elif average.value.weights_sha256 != result["weights_sha256"]:
        wrong.append("average: other weights than the run's")
    again = attempt(lambda: saved.evaluate(out / "swap.safetensors", None, world), world)
    reported = result["test_accuracy"]["averaged"]
    if again.error or not again.value:
        wrong.append(f"evaluate: {again.error}")
    elif again.value.test.accuracy != reported:
        wrong.append(f"evaluate: {again.value.test.accuracy}, the run reports {reported}")
    return wrong


def differing(one: Path, other: Path) -> list[str]:
    """Return the files and tensors in which two runs differ that should be equal bit for bit."""
    import fuzz_check
    from safetensors.torch import load_file

    wrong = []
    for name in ("large_batch", "group-000", "group-001", "swap"):
        left, right = (load_file(run / f"{name}.safetensors") for run in (one, other))
        if left.keys() != right.keys():
            wrong.append(f"{name} has other names: {sorted(left.keys() ^ right.keys())}")
            continue
        if odd := [key for key in left if not fuzz_check.same(left[key], right[key])]:
            wrong.append(f"{name} differs in {', '.join(odd)}")
    results = [json.loads((run / "result.json").read_text()) for run in (one, other)]
    if results[0]["weights_sha256"] != results[1]["weights_sha256"]:
        wrong.append("result.json has another weights_sha256")
    return wrong


# Runs inside this process


def train(
    recipe: "Recipe",
    out: Path,
    world: "Team",
    control: "Control | None" = None,
    part: "Part | None" = None,
) -> dict[str, Any] | None:
    """Train as `swap-hpc train` does, without printing anything; the result is on all ranks."""
    from rich.console import Console

    from swap_hpc.run import run
    from swap_hpc.train.control import Control

    console = Console(file=io.StringIO())
    started = time.perf_counter()
    done = run.train(recipe, out, world, console, control or Control(), started, part)
    return world.broadcast(done)


def train_with_stops(
    recipe: "Recipe",
    out: Path,
    world: "Team",
    seed: int,
    places: list[str],
) -> dict[str, Any] | None:
    """Start a run again and again until it is complete; add to `places` where it was stopped."""
    from swap_hpc.errors import Stopped

    draw = random.Random(f"stops {seed}")
    for start in range(STARTS):
        heartbeat = draw.randrange(1, HEARTBEATS // (start + 1))
        # A launcher signals all ranks, a person perhaps one.
        asked = draw.choice([[0], [1], [0, 1]]) if start < STARTS - 1 else []
        control = asked_at(heartbeat if world.rank in asked else None)
        try:
            return train(recipe, out, world, control)
        except Stopped:
            where = world.allgather(control.asked_in)
            stops = [f"{place} on rank {rank}" for rank, place in enumerate(where) if place]
            places.append(" and ".join(stops))
    raise AssertionError("the last start was stopped")


def asked_at(number: int | None) -> Any:
    """Return a control that is asked to stop at a heartbeat, as by a signal; None: never."""
    from swap_hpc.train.control import Control

    class AskedControl(Control):
        asked_in = ""  # what the rank was doing at that heartbeat

        def heartbeat(self, where: str) -> None:
            super().heartbeat(where)
            if number is not None and self.heartbeats >= number and not self.stop:
                self.stop, self.asked_in = True, where

    return AskedControl()


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """What a function returned on this rank, or how it failed on all ranks."""

    value: T | None = None
    kind: str = ""  # the class of the error
    error: str = ""


def attempt(function: Callable[[], T], world: "Team") -> Attempt[T]:
    """Call a function on all ranks. Where it fails only on some of them, all ranks end."""
    value, kind, error = None, "", ""
    try:
        value = function()
    except Exception as raised:
        kind, error = type(raised).__name__, described(raised)
    await_others(world, error)
    errors = world.allgather((kind, error))
    if not any(kind for kind, _ in errors):
        return Attempt(value)
    end_horovod()
    if len({kind for kind, _ in errors}) > 1:
        return Attempt(None, "", f"not alike on all ranks: {errors}")
    return Attempt(None, *errors[0])


def described(error: Exception) -> str:
    """Return a user's error as it is printed; any other with its name and place."""
    if type(error).__name__ == "UserError":
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return f"{type(error).__name__}: {str(error)[-500:]} ({places})"


def await_others(world: "Team", error: str) -> None:
    """Wait for the other ranks; with an error not for long, since they may wait for this rank."""
    from swap_hpc.parallel.mpi import abort

    deadline = time.monotonic() + PATIENCE
    request = world.comm.Ibarrier()
    while not request.Test():
        if error and time.monotonic() > deadline:
            print(f"on rank {world.rank} only: {error}", file=sys.stderr, flush=True)
            time.sleep(0.2)  # the launcher may drop what it has not forwarded yet
            abort(3)
        time.sleep(0.002)


def end_horovod() -> None:
    """Shut down the Horovod that a failed training leaves; a command would end instead."""
    import horovod.torch as hvd

    if hvd.is_initialized():
        hvd.shutdown()


@contextmanager
def patched() -> Iterator[None]:
    """Have a team check at every step, and let no watchdog outlive a run that was stopped."""
    from swap_hpc.run import run
    from swap_hpc.train import team_check

    watching = run.watching

    @contextmanager
    def ending(*arguments: Any) -> Iterator[None]:
        watch = watching(*arguments)
        watch.__enter__()
        try:
            yield
        finally:
            watch.__exit__(None, None, None)

    with ExitStack() as stack:
        stack.enter_context(patch.object(run, "watching", ending))
        stack.enter_context(patch.object(team_check, "CHECK_SECONDS", 0.0))
        yield


if __name__ == "__main__":
    main()
