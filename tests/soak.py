"""The fault matrix: runs that are killed, stopped, broken and hung at every place, and restarted.

    python tests/soak.py [--faults 60] [--seed 0]

Each chain is one run of a small recipe that meets a fault at every place, one after the other. At
the end it must equal the same run left undisturbed, bit for bit: the hash of its weights and every
logged loss and accuracy.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from faults import KINDS, PLACES
from launch import BIN, Finished, command, hydra, processes_of, settings

HERE = Path(__file__).parent
HANG_SECONDS = 10  # watchdog.minutes, in seconds: longer than a first step on a busy machine

RECIPE = {
    "model.width": 4,
    "large_batch.epochs": 3,
    "large_batch.batch_size": 240,
    "refine.epochs": 2,
    "refine.cycles": 2,
    "refine.batch_size": 60,
    "watchdog.minutes": HANG_SECONDS / 60,
    "checkpoint.minutes": 0.002,
}


@dataclass(frozen=True)
class Layout:
    """How a run's groups lie on its ranks."""

    ranks: int
    groups: int
    evaluate_average: int = 0  # epochs between sync points; 0: one sync point, at the end

    def __str__(self) -> str:
        sync_points = ", sync points" if self.evaluate_average else ""
        return f"{self.ranks} ranks, {self.groups} groups{sync_points}"


LAYOUTS = (Layout(1, 1), Layout(2, 2), Layout(4, 4), Layout(4, 2), Layout(2, 4))

# Exit codes of mpirun, and of a rank that was started alone. Where a signal kills a rank, the
# launcher chooses the code.
LOST = 9 if hydra() else 137
CODES = {
    "kill": (LOST, -9),
    "kill_all": (-9, -9),
    "kill_in_save": (LOST, -9),
    "sigterm": (75, 75),
    "sigusr1": (75, 75),
    "exception": (3, 3),
    "hang": (3, 3),
}
# Seconds from the fault to the end of the job, as slurm/README.md states them. They are doubled
# where there are more ranks than cores.
LIMITS = {
    "kill": 2.0,
    "kill_all": 2.0,
    "kill_in_save": 2.0,
    "sigterm": 5.0,
    "sigusr1": 5.0,
    "exception": 5.0,
    "hang": 1.2 * HANG_SECONDS + 5.0,
}


@dataclass
class Outcome:
    """What became of one fault."""

    layout: Layout
    kind: str
    place: str
    seconds: float = 0.0  # from the fault to the end of the job
    wrong: list[str] = field(default_factory=list)  # empty: the run survived the fault


def chain(
    layout: Layout,
    kinds: list[str],
    draw: random.Random,
    expected: dict[str, Any],
    out: Path,
    timed: bool = True,
) -> list[Outcome]:
    """Run one recipe through a fault at every place, then to its end.

    Args:
        layout: ranks and groups of the run.
        kinds: the kind of fault at each place, in the order of `PLACES`.
        draw: chooses ranks and steps of the faults.
        expected: the `record` of the undisturbed run.
        out: the run's folder.
        timed: whether a fault after which the job takes longer than `LIMITS` to end is lost.
    """
    pairs = zip(kinds, PLACES, strict=True)
    outcomes = [fault(layout, kind, place, draw, out, timed) for kind, place in pairs]
    done = start(layout, out)
    if done.code == 0:
        wrong = differences(expected, record(out)) + leftovers(out)
    else:
        wrong = [f"the last start ended with {done.code}: {done.stderr[-1000:]}"]
    for outcome in outcomes:
        outcome.wrong += wrong
    return outcomes


def leftovers(out: Path) -> list[str]:
    """Return the files that a complete run should have removed."""
    return [
        f"left: {path.name}"
        for path in out.rglob("*")
        if path.name.startswith(".") or path.name == "checkpoints"
    ]


def fault(
    layout: Layout, kind: str, place: str, draw: random.Random, out: Path, timed: bool
) -> Outcome:
    """Start or restart the run with one fault on its way, and judge how it ended."""
    outcome = Outcome(layout, kind, place)
    mark = out.with_suffix(f".{place}")
    done = start(layout, out, drawn_fault(layout, kind, place, draw, mark))
    ended = time.time()
    if not mark.exists():
        outcome.wrong.append(
            f"the fault did not happen; exit code {done.code}: {done.stderr[-1000:]}"
        )
        return outcome
    outcome.seconds = ended - json.loads(mark.read_text())["time"]
    outcome.wrong += wrong_code(layout, kind, done)
    cores = os.cpu_count() or 1
    crowded = 2 if layout.ranks > cores else 1
    if timed and outcome.seconds > LIMITS[kind] * crowded:
        outcome.wrong.append(f"took {outcome.seconds:.1f} s to end")
    left = processes_of(out, within=3)
    if left:
        outcome.wrong.append(f"left processes {left}")
    resumed = any("goes on" in line for line in done.stdout.splitlines())
    if place != "large_batch" and not resumed:
        outcome.wrong.append(f"started from scratch: {done.stdout[-1000:]}")
    return outcome


def drawn_fault(
    layout: Layout, kind: str, place: str, draw: random.Random, mark: Path
) -> dict[str, Any]:
    """Return the fields of a `faults.Fault` whose rank and step are drawn."""
    # Only the first rank of the world or of a group saves; rank 0 is both.
    rank = draw.randrange(layout.ranks) if kind != "kill_in_save" else 0
    step = ""
    if place in ("large_batch", "refine"):
        step = draw.choice(["epoch 2, step 2", "epoch 2, step 3", "epoch 3, step 1"])
    # Nobody watches a rank that runs alone from outside, so it is never stopped as a whole.
    stopped = layout.ranks > 1 and draw.random() < 0.5
    return {
        "kind": kind,
        "place": place,
        "rank": rank,
        "mark": str(mark),
        "step": step,
        "stopped": stopped,
    }


def wrong_code(layout: Layout, kind: str, done: Finished) -> list[str]:
    """Return a complaint if the job's exit code is not that of `CODES`."""
    code = CODES[kind][0 if layout.ranks > 1 else 1]
    saved = "swap-hpc: stopped on request, all is saved" in done.stdout
    # MPICH's launcher sometimes ends with 0 after a SIGUSR1, although all was saved.
    zero_by_hydra = hydra() and layout.ranks > 1 and kind == "sigusr1" and done.code == 0
    if done.code == code or (zero_by_hydra and saved):
        return []
    return [f"exit code {done.code}, not {code}: {done.stdout[-500:]} {done.stderr[-1500:]}"]


def start(layout: Layout, out: Path, what: dict[str, Any] | None = None) -> Finished:
    """Start the run, with the fault `what` if there is one."""
    program: list[str | Path] = [BIN / "swap-hpc"]
    if what:
        program = [sys.executable, HERE / "faults.py", json.dumps(what)]
    fields = {**RECIPE, "groups": layout.groups, "refine.evaluate_average": layout.evaluate_average}
    options = settings(*(f"{name}={value}" for name, value in fields.items()))
    line = [*program, "train", "digits", *options, "--out", out]
    ranks = layout.ranks if layout.ranks > 1 else None
    return command(*line, ranks=ranks, variables={"OMP_NUM_THREADS": "1"})


def record(out: Path) -> dict[str, Any]:
    """Return what must not depend on faults.

    These are the result's accuracies, losses and hash, and the logged lines without their times
    and memory.
    """
    result = json.loads((out / "result.json").read_text())
    names = ("weights_sha256", "epochs", "train_accuracy", "test_accuracy", "test_loss")
    kept = {name: result[name] for name in names}
    for path in sorted((out / "metrics").glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept[path.name] = [
            {k: v for k, v in line.items() if "second" not in k and not k.startswith("peak_")}
            for line in lines
        ]
    return kept


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [
        f"{key} differs: {found.get(key)} is not {expected.get(key)}"
        for key in sorted(expected.keys() | found.keys())
        if expected.get(key) != found.get(key)
    ]


def undisturbed(layout: Layout, folder: Path) -> dict[str, Any]:
    """Return the `record` of a run without faults."""
    out = folder / f"undisturbed-{layout.ranks}-{layout.groups}-{layout.evaluate_average}"
    done = start(layout, out)
    assert done.code == 0, done.stderr
    return record(out)


def chains(seed: int) -> Iterator[tuple[Layout, list[str]]]:
    """Yield layouts and the kinds of fault at each place, in an order that the seed draws.

    Over all chains, every kind happens at every place in every layout once: the chains of a layout
    are the rows of a Latin rectangle.
    """
    draw = random.Random(seed)
    every = [(layout, first) for layout in LAYOUTS for first in range(len(KINDS))]
    kinds = {layout: draw.sample(KINDS, len(KINDS)) for layout in LAYOUTS}
    draw.shuffle(every)
    for layout, first in every:
        row = [kinds[layout][(first + place) % len(KINDS)] for place in range(len(PLACES))]
        yield replace(layout, evaluate_average=first % 2), row


def soak(faults: int, seed: int, folder: Path) -> list[Outcome]:
    """Run chains until there are at least `faults` outcomes, and print each outcome."""
    draw = random.Random(seed)
    expected: dict[Layout, dict[str, Any]] = {}
    outcomes: list[Outcome] = []
    for number, (layout, kinds) in enumerate(chains(seed)):
        if len(outcomes) >= faults:
            break
        if layout not in expected:
            expected[layout] = undisturbed(layout, folder)
        new = chain(layout, kinds, draw, expected[layout], folder / f"chain-{number:03d}")
        outcomes += new
        for outcome in new:
            print(f"{len(outcomes):>4}  {line_of(outcome)}", flush=True)
    return outcomes


def line_of(outcome: Outcome) -> str:
    judgement = "; ".join(outcome.wrong) or "survived"
    fault = f"{outcome.place:<12} {outcome.kind:<13}"
    return f"{outcome.layout}  {fault} {outcome.seconds:5.1f} s  {judgement}"


def table(outcomes: list[Outcome]) -> str:
    """Return a Markdown table: survived / tried of each kind and place, and seconds to exit."""
    head = ["fault", *PLACES, "tried", "survived", "lost", "seconds to exit: median, most"]
    rows = []
    for kind in KINDS:
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        if of_kind:
            cells = [survived([o for o in of_kind if o.place == place]) for place in PLACES]
            seconds = sorted(outcome.seconds for outcome in of_kind)
            spread = f"{seconds[len(seconds) // 2]:.1f}, {seconds[-1]:.1f}"
            rows.append([kind, *cells, *counts(of_kind), spread])
    rows.append(["all", *[""] * len(PLACES), *counts(outcomes), ""])
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def survived(outcomes: list[Outcome]) -> str:
    return f"{sum(not outcome.wrong for outcome in outcomes)}/{len(outcomes)}"


def counts(outcomes: list[Outcome]) -> list[str]:
    """Return how many faults were tried, survived and lost."""
    lost = sum(bool(outcome.wrong) for outcome in outcomes)
    return [str(len(outcomes)), str(len(outcomes) - lost), str(lost)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = soak(given.faults, given.seed, Path(folder))
    print(f"\n{table(outcomes)}")
    sys.exit(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    main()
