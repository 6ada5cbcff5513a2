"""The fault matrix: runs that are killed, stopped, broken and hung at every place, and restarted.

    [SLOW=10] python tests/soak.py [--faults 60] [--seed 0] [--first 0]
    python tests/soak.py --of piece-1.txt piece-2.txt

Each chain is one run of a small recipe that meets a fault at every place, one after the other. At
the end it must equal the same run left undisturbed, bit for bit: the hash of its weights and every
logged loss and accuracy. SLOW says how many times slower the machine is than an idle one: the
limits of time are so much longer.

With --of it runs nothing, and prints one table of what earlier pieces have printed.
"""

import argparse
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from faults import KINDS, PLACES
from soak_faults import Outcome, fault
from soak_starts import (
    Layout,
    Place,
    differences,
    leftovers,
    place_for,
    record,
    start,
    undisturbed,
)

LAYOUTS = (Layout(1, 1), Layout(2, 2), Layout(4, 4), Layout(4, 2), Layout(2, 4))


def chain(
    layout: Layout,
    kinds: list[str],
    draw: random.Random,
    expected: dict[str, Any],
    place: Place,
    timed: bool = True,
) -> list[Outcome]:
    """Run one recipe through a fault at every place, then to its end.

    Args:
        layout: ranks and groups of the run.
        kinds: the kind of fault at each place, in the order of `PLACES`.
        draw: chooses ranks and steps of the faults.
        expected: the `record` of the undisturbed run.
        place: where the run writes.
        timed: whether a fault after which the job takes longer than `LIMITS` to end is lost.
    """
    outcomes: list[Outcome] = []
    for kind, where in zip(kinds, PLACES, strict=True):
        outcomes.append(fault(layout, kind, where, draw, place, timed))
    done = start(layout, place.out, {})
    if done.code == 0:
        wrong = differences(expected, record(place.out)) + leftovers(place.out)
    else:
        wrong = [f"the last start ended with {done.code}: {done.stderr[-1000:]}"]
    reports = "\n".join([*(outcome.stderr for outcome in outcomes), done.stderr])
    for outcome in outcomes:
        outcome.wrong += wrong
        if outcome.damaged and f"warning: {outcome.damaged} is " not in reports:
            outcome.wrong.append(f"no start reported that {outcome.damaged.name} is damaged")
    return outcomes


def chains(seed: int) -> Iterator[tuple[Layout, list[str]]]:
    """Yield layouts and the kinds of fault at each place, in an order that the seed draws.

    Over all chains, every kind happens at every place in every layout once: the chains of a layout
    are the rows of a Latin rectangle.
    """
    draw = random.Random(seed)
    kinds = {layout: shuffled(kinds_in(layout), draw) for layout in LAYOUTS}
    every = [(layout, first) for layout in LAYOUTS for first in range(len(kinds[layout]))]
    draw.shuffle(every)
    for layout, first in every:
        own = kinds[layout]
        row = [own[(first + place) % len(own)] for place in range(len(PLACES))]
        yield replace(layout, evaluate_average=first % 2), row


def kinds_in(layout: Layout) -> list[str]:
    """Return the kinds of fault that a layout can meet: a rank alone has no other host to lose."""
    return [kind for kind in KINDS if kind != "host_lost" or layout.ranks > 1]


def shuffled(kinds: list[str], draw: random.Random) -> list[str]:
    return draw.sample(kinds, len(kinds))


def soak(faults: int, seed: int, first: int, folder: Path) -> list[Outcome]:
    """Run chains until there are at least `faults` outcomes, and print each outcome.

    Args:
        faults: how many, at least.
        seed: of the chains' order, ranks and steps.
        first: chains of this seed to leave out, which an earlier piece has run.
        folder: of the runs.
    """
    expected: dict[Layout, dict[str, Any]] = {}
    outcomes: list[Outcome] = []
    for number, (layout, kinds) in enumerate(chains(seed)):
        if number < first:
            continue
        if len(outcomes) >= faults:
            break
        draw = random.Random(f"{seed} {number}")
        if layout not in expected:
            expected[layout] = undisturbed(layout, folder)
        with place_for(folder / f"chain-{number:03d}") as place:
            new = chain(layout, kinds, draw, expected[layout], place)
        outcomes += new
        for outcome in new:
            print(f"chain {number:>3}  {line_of(outcome)}", flush=True)
    return outcomes


def line_of(outcome: Outcome) -> str:
    judgement = "; ".join(outcome.wrong) or "survived"
    if outcome.skipped:
        judgement = f"skipped: {outcome.skipped}"
    fault = f"{outcome.place:<12} {outcome.kind:<13}"
    return f"{outcome.layout}  {fault} {outcome.seconds:5.1f} s  {judgement}"


LINE = re.compile(
    r"chain +\d+  (\d+) ranks, (\d+) groups(, sync points)?  (\w+) +(\w+) +([0-9.]+) s  (.+)"
)


def outcome_of(line: str) -> Outcome | None:
    """Return what `line_of` wrote; None for any other line."""
    found = LINE.fullmatch(line.rstrip())
    if not found:
        return None
    ranks, groups, sync_points, place, kind, seconds, judgement = found.groups()
    outcome = Outcome(Layout(int(ranks), int(groups), bool(sync_points)), kind, place)
    outcome.seconds = float(seconds)
    if judgement.startswith("skipped: "):
        outcome.skipped = judgement.removeprefix("skipped: ")
    elif judgement != "survived":
        outcome.wrong.append(judgement)
    return outcome


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
    tried, good, _ = counts(outcomes)
    return f"{good}/{tried}"


def counts(outcomes: list[Outcome]) -> list[str]:
    """Return how many faults were tried, survived and lost."""
    tried = [outcome for outcome in outcomes if not outcome.skipped]
    lost = sum(bool(outcome.wrong) for outcome in tried)
    return [str(len(tried)), str(len(tried) - lost), str(lost)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="chain to begin with")
    parser.add_argument("--of", type=Path, nargs="+", help="what earlier pieces have printed")
    given = parser.parse_args()
    if given.of:
        lines = [line for file in given.of for line in file.read_text("utf-8").splitlines()]
        outcomes = [outcome for line in lines if (outcome := outcome_of(line))]
    else:
        with tempfile.TemporaryDirectory() as folder:
            outcomes = soak(given.faults, given.seed, given.first, Path(folder))
    print(f"\n{table(outcomes)}")
    sys.exit(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    main()
