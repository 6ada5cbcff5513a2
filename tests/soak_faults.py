"""One fault of a run: the start that meets it, what happens around it, and how it is judged."""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosts import Cluster, Refused
from launch import Finished, command, hydra, processes_of, wait_for
from soak_starts import (
    HANG_SECONDS,
    HERE,
    SLOW,
    Layout,
    Place,
    begin,
    begin_on_hosts,
    end_of,
    line_of_start,
    owned_files,
    start,
)

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
    "disk_full": (3, 3),
    "torn_file": (LOST, -9),
    "two_owners": (75, 75),
}
# Seconds from the fault to the end of the job, as slurm/README.md states them. They are doubled
# where there are more ranks than cores, and multiplied by SLOW.
LIMITS = {
    "kill": 2.0,
    "kill_all": 2.0,
    "kill_in_save": 2.0,
    "sigterm": 5.0,
    "sigusr1": 5.0,
    "exception": 5.0,
    "hang": 1.2 * HANG_SECONDS / SLOW + 5.0,
    "disk_full": 5.0,
    "torn_file": 2.0,
    "two_owners": 5.0,
    # The watchdog ends the ranks, and then mpirun, unless mpirun has noticed the loss before.
    "host_lost": HANG_SECONDS / SLOW + 15.0 + 5.0,
}


@dataclass
class Outcome:
    """What became of one fault."""

    layout: Layout
    kind: str
    place: str
    seconds: float = 0.0  # from the fault to the end of the job
    wrong: list[str] = field(default_factory=list)  # empty: the run survived the fault
    skipped: str = ""  # why the fault could not be tried
    damaged: Path | None = None  # a save that a later start must report
    stderr: str = ""  # of the start


def fault(
    layout: Layout, kind: str, where: str, draw: random.Random, place: Place, timed: bool
) -> Outcome:
    """Start or restart the run with one fault on its way, and judge how it ended."""
    outcome = Outcome(layout, kind, where)
    if kind == "disk_full" and place.filler is None:
        outcome.skipped = place.why_unlimited
        return outcome
    mark = place.marks / where
    what = drawn_fault(layout, kind, where, draw, mark)
    if kind == "disk_full":
        what["filler"] = str(place.filler)
    try:
        done = STARTS.get(kind, plain_start)(layout, place, what, outcome, draw)
    except Refused as why:
        outcome.skipped = str(why)
        return outcome
    ended = time.time()
    outcome.stderr = done.stderr
    if not mark.exists():
        outcome.wrong.append(
            f"the fault did not happen; exit code {done.code}: {done.stderr[-1000:]}"
        )
        return outcome
    outcome.seconds = ended - json.loads(mark.read_text())["time"]
    outcome.wrong += wrong_code(layout, kind, done)
    cores = os.cpu_count() or 1
    crowded = 2 if layout.ranks > cores else 1
    if timed and outcome.seconds > LIMITS[kind] * crowded * SLOW:
        outcome.wrong.append(f"took {outcome.seconds:.1f} s to end")
    left = processes_of(place.out, within=3)
    if left:
        outcome.wrong.append(f"left processes {left}")
    resumed = any("goes on" in line for line in done.stdout.splitlines())
    if where != "large_batch" and not resumed:
        outcome.wrong.append(f"started from scratch: {done.stdout[-1000:]}")
    return outcome


def drawn_fault(
    layout: Layout, kind: str, where: str, draw: random.Random, mark: Path
) -> dict[str, Any]:
    """Return the fields of a `faults.Fault` whose rank and step are drawn."""
    # Only the first rank of the world or of a group saves; rank 0 is both.
    rank = draw.randrange(layout.ranks) if kind != "kill_in_save" else 0
    step = ""
    if where in ("large_batch", "refine"):
        step = draw.choice(["epoch 2, step 2", "epoch 2, step 3", "epoch 3, step 1"])
    # Nobody watches a rank that runs alone from outside, so it is never stopped as a whole.
    stopped = layout.ranks > 1 and draw.random() < 0.5
    return {
        "kind": kind,
        "place": where,
        "rank": rank,
        "mark": str(mark),
        "step": step,
        "stopped": stopped,
    }


def wrong_code(layout: Layout, kind: str, done: Finished) -> list[str]:
    """Return a complaint if the job's exit code is not that of `CODES`.

    Where a host is lost, Open MPI's launcher ends with 0 or is killed: the reason matters.
    """
    if kind == "host_lost":
        reasons = ("PRTE has lost communication with a remote daemon", "swap-hpc: no progress for")
        known = any(reason in done.stderr for reason in reasons)
        return [] if known else [f"no reason: {done.stderr[-1500:]}"]
    code = CODES[kind][0 if layout.ranks > 1 else 1]
    saved = "swap-hpc: stopped on request, all is saved" in done.stdout
    # MPICH's launcher sometimes ends with 0 after a SIGUSR1, although all was saved.
    zero_by_hydra = hydra() and layout.ranks > 1 and kind == "sigusr1" and done.code == 0
    if done.code == code or (zero_by_hydra and saved):
        return []
    return [f"exit code {done.code}, not {code}: {done.stdout[-500:]} {done.stderr[-1500:]}"]


# Each of the following starts the run and returns how it ended; complaints go into the outcome.
Start = Callable[[Layout, Place, dict[str, Any], Outcome, random.Random], Finished]


def plain_start(
    layout: Layout, place: Place, what: dict[str, Any], outcome: Outcome, draw: random.Random
) -> Finished:
    return start(layout, place.out, what)


def start_on_a_full_disk(
    layout: Layout, place: Place, what: dict[str, Any], outcome: Outcome, draw: random.Random
) -> Finished:
    """Start a run whose disk is full from the fault on; there is room again afterwards."""
    done = start(layout, place.out, what)
    assert place.filler
    place.filler.unlink(missing_ok=True)
    # A save that the fault before tore is told of in a line of its own.
    ours = [line for line in done.ours if not line.startswith("swap-hpc: warning: ")]
    full = [line for line in ours if line.endswith("No space left on device")]
    if len(ours) != 1 or not full:
        outcome.wrong.append(f"no clear line: {done.ours}")
    return done


def start_and_tear(
    layout: Layout, place: Place, what: dict[str, Any], outcome: Outcome, draw: random.Random
) -> Finished:
    """Start a run whose fault kills it, then damage a file as a crash of a file server does."""
    done = start(layout, place.out, what)
    parts: dict[str, list[Path]] = {}
    for file in sorted((place.out / "checkpoints").glob("*-?????-???????.safetensors")):
        parts.setdefault(file.name[:-25], []).append(file)
    saves = [files[-1] for files in parts.values() if len(files) > 1]
    files = [*saves, *sorted(place.out.glob("*.safetensors"))]
    if not files:
        outcome.skipped = "there was one save only"
        return done
    file = draw.choice(files)
    content = bytearray(file.read_bytes())
    middle = draw.randrange(len(content))
    if draw.random() < 0.5:
        del content[middle:]
    else:
        content[middle] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    outcome.damaged = file if file in saves else None
    return done


def start_of_a_second_job(
    layout: Layout, place: Place, what: dict[str, Any], outcome: Outcome, draw: random.Random
) -> Finished:
    """Start a second job while the first one is at the fault; the first one then goes on."""
    mark, out = Path(what["mark"]), place.out
    # The first job stands still meanwhile, which its watchdog must bear.
    job = begin(layout, out, what, f"watchdog.minutes={5 * SLOW}")
    wait_for(lambda: mark.exists() or job.poll() is not None, "fault")
    before = owned_files(out)
    _, *words = line_of_start(layout, out)
    second = command(sys.executable, HERE / "hasty.py", *words)
    in_use = [line for line in second.ours if line.startswith(f"swap-hpc: {out} is in use by ")]
    if second.code != 2 or len(second.ours) != 1 or not in_use:
        outcome.wrong.append(f"the second job ended with {second.code}: {second.ours}")
    if owned_files(out) != before:
        outcome.wrong.append("the second job changed the folder")
    released(mark).touch()
    return end_of(job)


def start_on_hosts(
    layout: Layout, place: Place, what: dict[str, Any], outcome: Outcome, draw: random.Random
) -> Finished:
    """Start the run on two hosts, and cut one of them off at the fault."""
    mark = Path(what["mark"])
    lost = draw.choice(["host-0", "host-1"])
    with Cluster(2, cores=1.0, rate=None) as cluster:
        job = begin_on_hosts(cluster, layout, place.out, what)
        wait_for(lambda: mark.exists() or job.poll() is not None, "fault")
        cluster.cut(lost)
        mark.write_text(json.dumps({"time": time.time()}), encoding="utf-8")
        released(mark).touch()
        done = end_of(job)
        left = processes_of(place.out, within=3)
        if left:
            outcome.wrong.append(f"left processes {left} on the hosts")
    return done


def released(mark: Path) -> Path:
    """Return the file for which a fault waits that happens outside of the run."""
    return mark.with_suffix(".released")


STARTS: dict[str, Start] = {
    "disk_full": start_on_a_full_disk,
    "torn_file": start_and_tear,
    "two_owners": start_of_a_second_job,
    "host_lost": start_on_hosts,
}
