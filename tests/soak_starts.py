"""The small run that `soak.py` starts again and again, and what must not depend on its faults."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disks import CannotMount, small_disk
from hosts import Cluster
from launch import BIN, HANG, Finished, command, launch, settings

HERE = Path(__file__).parent
# How many times slower this machine is than one which does nothing else.
SLOW = float(os.environ.get("SLOW", "1"))
HANG_SECONDS = 10 * SLOW  # watchdog.minutes, in seconds: longer than a first step

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

# So that mpirun finds a host that is cut off within 8 s, and not within the minute that
# swap_hpc/install/setup.sh sets. The sums of ranks on hosts are those of ranks on one host.
ON_HOSTS = {
    "PRTE_MCA_oob_tcp_keepalive_time": "4",
    "PRTE_MCA_oob_tcp_keepalive_intvl": "2",
    "PRTE_MCA_oob_tcp_keepalive_probes": "2",
    "OMPI_MCA_coll": "^han",
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


@dataclass(frozen=True)
class Place:
    """Where the starts of one run write.

    Attributes:
        out: the run's folder.
        marks: a folder beside it, for what must not be on its disk.
        filler: a file that fills the run's disk; None where the disk has no limit.
        why_unlimited: why it has none.
    """

    out: Path
    marks: Path
    filler: Path | None = None
    why_unlimited: str = ""


@contextmanager
def place_for(out: Path) -> Iterator[Place]:
    """Make a folder for a run, on a small disk of its own where this can be had."""
    marks = out.with_name(f"{out.name}-marks")
    marks.mkdir(parents=True)
    try:
        with small_disk(out.with_name(f"{out.name}-disk"), "64m") as disk:
            yield Place(disk / out.name, marks, disk / "filler")
    except CannotMount as why:
        yield Place(out, marks, why_unlimited=f"no small disk can be mounted: {why}")


def line_of_start(
    layout: Layout, out: Path, what: dict[str, Any] | None = None, *fields: str
) -> list[str]:
    """Return the words that start the run.

    Args:
        layout: ranks and groups of the run.
        out: its folder.
        what: the fields of a `faults.Fault`; empty: none happens; None: not even by `faults.py`.
        fields: further fields of the recipe, as `watchdog.minutes=5`.
    """
    program = [str(BIN / "swap-hpc")]
    if what is not None:
        program = [sys.executable, str(HERE / "faults.py"), json.dumps(what)]
    given = {**RECIPE, "groups": layout.groups, "refine.evaluate_average": layout.evaluate_average}
    options = settings(*(f"{name}={value}" for name, value in given.items()), *fields)
    return [*program, "train", "digits", *options, "--out", str(out)]


def start(layout: Layout, out: Path, what: dict[str, Any] | None = None) -> Finished:
    """Start the run, and wait for its end."""
    line = line_of_start(layout, out, what)
    ranks = layout.ranks if layout.ranks > 1 else None
    return command(*line, ranks=ranks, variables={"OMP_NUM_THREADS": "1"})


def begin(layout: Layout, out: Path, what: dict[str, Any], *fields: str) -> "subprocess.Popen[str]":
    """Start the run, and return at once."""
    ranks = layout.ranks if layout.ranks > 1 else None
    line = line_of_start(layout, out, what, *fields)
    return launch(*line, ranks=ranks, variables={"OMP_NUM_THREADS": "1"})


def begin_on_hosts(
    cluster: Cluster, layout: Layout, out: Path, what: dict[str, Any]
) -> "subprocess.Popen[str]":
    """Start the run on hosts of its own, and return at once."""
    pipe, env = subprocess.PIPE, {**os.environ, **ON_HOSTS, "OMP_NUM_THREADS": "1"}
    line = line_of_start(layout, out, what)
    return cluster.start(layout.ranks, line, stdout=pipe, stderr=pipe, text=True, env=env)


def end_of(job: "subprocess.Popen[str]") -> Finished:
    """Wait for a job that `begin` started."""
    stdout, stderr = job.communicate(timeout=HANG)
    return Finished(job.returncode, stdout, stderr)


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


def leftovers(out: Path) -> list[str]:
    """Return the files that a complete run should have removed."""
    return [
        f"left: {path.name}"
        for path in out.rglob("*")
        if path.name.startswith(".") or path.name == "checkpoints"
    ]


def owned_files(out: Path) -> dict[str, bytes]:
    """Return the files that a job writes at its start, and phase 1's metrics, with their content.

    Ranks of other groups may be writing other files.
    """
    names = (".owner", "recipe.toml", "environment.json", "metrics/world.jsonl")
    return {name: (out / name).read_bytes() for name in names}


def undisturbed(layout: Layout, folder: Path) -> dict[str, Any]:
    """Return the `record` of a run without faults."""
    out = folder / f"undisturbed-{layout.ranks}-{layout.groups}-{layout.evaluate_average}"
    done = start(layout, out)
    assert done.code == 0, done.stderr
    return record(out)
