"""The fault matrix: runs that are killed, stopped, broken and hung at every place, started again until they are complete.

    python tests/soak.py [--faults 60] [--seed 0] [--table FILE]

Each chain is one run of a small recipe that meets a fault at every place, one after the other. What it leaves at the end
must equal what the same run leaves undisturbed: the weights' hash and every logged loss and accuracy, to the bit.
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
from launch import BIN, Finished, command, hydra, processes_of

HERE = Path(__file__).parent
HANG_SECONDS = (
    10  # watchdog.minutes of these runs: longer than a first step takes on a busy machine
)

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
    ranks: int
    groups: int
    evaluate_average: int = 0  # the groups meet only at the end, or after every so many epochs

    def __str__(self) -> str:
        return f"{self.ranks} ranks, {self.groups} groups" + (
            ", meeting" if self.evaluate_average else ""
        )


LAYOUTS = (Layout(1, 1), Layout(2, 2), Layout(4, 4), Layout(4, 2), Layout(2, 4))

# Exit codes: of mpirun, and of a rank that was started alone. A rank killed by a signal has no say.
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
# Seconds from the fault to the end of the job, as slurm/README.md states them; where there are more ranks than cores, twice that.
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
    layout: Layout
    kind: str
    place: str
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


def chain(
    layout: Layout,
    kinds: list[str],
    draw: random.Random,
    expected: dict[str, Any],
    out: Path,
    patience: float = 1.0,
) -> list[Outcome]:
    """One run with a fault at every place, in their order: `kinds`, as many as there are places. `patience`: times the limits."""
    outcomes = [
        fault(layout, kind, place, draw, out, patience)
        for kind, place in zip(kinds, PLACES, strict=True)
    ]
    done = start(layout, out)
    wrong = (
        [] if done.code == 0 else [f"the last start ended with {done.code}: {done.stderr[-1000:]}"]
    )
    if done.code == 0:
        wrong += differences(expected, record(out))
        wrong += [
            f"left: {path.name}"
            for path in out.rglob("*")
            if path.name.startswith(".") or path.name == "checkpoints"
        ]
    for outcome in outcomes:
        outcome.wrong += wrong
    return outcomes


def fault(
    layout: Layout, kind: str, place: str, draw: random.Random, out: Path, patience: float
) -> Outcome:
    """Starts the run, or starts it again, into one fault."""
    outcome = Outcome(layout, kind, place)
    mark = out.with_suffix(f".{place}")
    # where a save is to be met, the rank is one that saves: the first of the world, or of its group
    rank = draw.randrange(layout.ranks) if kind != "kill_in_save" else 0
    at = (
        draw.choice(["epoch 2, step 2", "epoch 2, step 3", "epoch 3, step 1"])
        if place in ("large_batch", "refine")
        else ""
    )
    what = {"kind": kind, "place": place, "rank": rank, "mark": str(mark), "step": at}
    what["stopped"] = (
        layout.ranks > 1 and draw.random() < 0.5
    )  # a process that stands still alone is nobody's concern
    done = start(layout, out, what)
    ended = time.time()
    if not mark.exists():
        outcome.wrong.append(
            f"the fault did not happen; exit code {done.code}: {done.stderr[-1000:]}"
        )
        return outcome
    outcome.seconds = ended - json.loads(mark.read_text())["time"]
    code = CODES[kind][0 if layout.ranks > 1 else 1]
    stopped = "swap-hpc: stopped on request, all is saved" in done.stdout
    if done.code != code and not (
        hydra() and layout.ranks > 1 and kind == "sigusr1" and (done.code, stopped) == (0, True)
    ):
        outcome.wrong.append(
            f"exit code {done.code}, not {code}: {done.stdout[-500:]} {done.stderr[-1500:]}"
        )
    if outcome.seconds > patience * LIMITS[kind] * (
        2 if layout.ranks > (os.cpu_count() or 1) else 1
    ):
        outcome.wrong.append(f"took {outcome.seconds:.1f} s to end")
    left = processes_of(out, within=3)
    if left:
        outcome.wrong.append(f"left processes {left}")
    goes_on = any("goes on" in line for line in done.stdout.splitlines())
    if place != "large_batch" and not goes_on:
        outcome.wrong.append(f"began anew: {done.stdout[-1000:]}")
    return outcome


def start(layout: Layout, out: Path, what: dict[str, Any] | None = None) -> Finished:
    program: list[str | Path] = (
        [sys.executable, HERE / "faults.py", json.dumps(what)] if what else [BIN / "swap-hpc"]
    )
    ranks = layout.ranks if layout.ranks > 1 else None
    fields = {**RECIPE, "groups": layout.groups, "refine.evaluate_average": layout.evaluate_average}
    settings = [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]
    line = [*program, "train", "digits", *settings, "--out", out]
    return command(*line, ranks=ranks, timeout=120, variables={"OMP_NUM_THREADS": "1"})


def record(out: Path) -> dict[str, Any]:
    """What must not depend on faults: the result's figures, and every logged line but its times and the memory."""
    result = json.loads((out / "result.json").read_text())
    kept = {
        key: result[key]
        for key in ("weights_sha256", "epochs", "train_accuracy", "test_accuracy", "test_loss")
    }
    for path in sorted((out / "metrics").glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept[path.name] = [
            {k: v for k, v in line.items() if "second" not in k and not k.startswith("peak_")}
            for line in lines
        ]
    return kept


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [f"{key} differs: {found.get(key)} is not {expected.get(key)}" for key in sorted(expected.keys() | found.keys())
            if expected.get(key) != found.get(key)]  # fmt: skip


def undisturbed(layout: Layout, folder: Path) -> dict[str, Any]:
    out = folder / f"undisturbed-{layout.ranks}-{layout.groups}-{layout.evaluate_average}"
    done = start(layout, out)
    assert done.code == 0, done.stderr
    return record(out)


def chains(seed: int) -> Iterator[tuple[Layout, list[str]]]:
    """Every kind at every place in every layout, once, in an order that the seed draws: a square per layout."""
    draw = random.Random(seed)
    every = [(layout, first) for layout in LAYOUTS for first in range(len(KINDS))]
    kinds = {layout: draw.sample(KINDS, len(KINDS)) for layout in LAYOUTS}
    draw.shuffle(every)
    for layout, first in every:
        yield (
            replace(layout, evaluate_average=first % 2),
            [kinds[layout][(first + place) % len(KINDS)] for place in range(len(PLACES))],
        )


def soak(faults: int, seed: int, folder: Path) -> list[Outcome]:
    draw = random.Random(seed)
    expected: dict[Layout, dict[str, Any]] = {}
    outcomes: list[Outcome] = []
    for number, (layout, kinds) in enumerate(chains(seed)):
        if len(outcomes) >= faults:
            break
        if layout not in expected:
            expected[layout] = undisturbed(layout, folder)
        outcomes += chain(layout, kinds, draw, expected[layout], folder / f"chain-{number:03d}")
        for outcome in outcomes[-len(PLACES) :]:
            print(f"{len(outcomes):>4}  {outcome.layout}  {outcome.place:<12} {outcome.kind:<13} {outcome.seconds:5.1f} s  "
                  f"{'; '.join(outcome.wrong) or 'survived'}", flush=True)  # fmt: skip
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """Markdown: for each kind and place survived / tried, and the seconds to the end of the job."""
    head = ["fault", *PLACES, "tried", "survived", "lost", "seconds to exit: median, most"]
    rows = []
    for kind in KINDS:
        of_kind = [o for o in outcomes if o.kind == kind]
        if not of_kind:
            continue
        cells = []
        for place in PLACES:
            here = [o for o in of_kind if o.place == place]
            cells.append(f"{sum(not o.wrong for o in here)}/{len(here)}")
        seconds = sorted(o.seconds for o in of_kind)
        lost = sum(bool(o.wrong) for o in of_kind)
        spread = f"{seconds[len(seconds) // 2]:.1f}, {seconds[-1]:.1f}"
        rows.append([kind, *cells, str(len(of_kind)), str(len(of_kind) - lost), str(lost), spread])
    lost = sum(bool(o.wrong) for o in outcomes)
    rows.append(
        ["all", *[""] * len(PLACES), str(len(outcomes)), str(len(outcomes) - lost), str(lost), ""]
    )
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


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
