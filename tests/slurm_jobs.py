"""Jobs on the two-node cluster, as a user submits them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cluster_of_two import ROOT, Cluster
from launch import wait_for

TESTS = Path(__file__).parent
SMALL = ("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")  # part of a node
TWO_NODES = ("--nodes=2", *SMALL)


def user_folder(folder: Path) -> Path:
    """Copy the shipped batch scripts, without this checkout's settings, to call sbatch there."""
    shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("site.env"))
    return folder


def submit(
    cluster: Cluster,
    home: Path,
    *line: str | Path,
    script: str = "slurm/swap.sbatch",
    options: tuple[str, ...] = TWO_NODES,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Submit a batch script with arguments, and return the job's number."""
    command = ("sbatch", "--parsable", *options, script, *line)
    return int(cluster.run(*command, variables=variables, cwd=home))


def complete(cluster: Cluster, job: int, out: Path) -> dict[str, Any]:
    """Wait for a job to end without an error, and return its run's result."""
    (ended,) = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), output(ended)
    return json.loads((out / "result.json").read_text())


def output(job: dict[str, str]) -> str:
    """Return what a job printed."""
    return Path(job["StdOut"]).read_text(encoding="utf-8")


def lines(file: Path) -> int:
    """Return the number of epochs in a file of metrics."""
    return file.read_text(encoding="utf-8").count("\n") if file.exists() else 0


def read_lines(out: Path, part: str) -> list[dict[str, Any]]:
    """Return the metrics of a part of a run ("world", "group-000" ...)."""
    text = (out / "metrics" / f"{part}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def reached(out: Path, part: str, epochs: int) -> None:
    """Wait until a part of a run ("world", "group-000" ...) has completed so many epochs."""
    file = out / "metrics" / f"{part}.jsonl"
    what = f"epoch {epochs} of {part} in {out}"
    wait_for(lambda: lines(file) >= epochs, what, every=0.02)


def further(out: Path, part: str, epochs: int) -> None:
    """Wait until a part of a run has completed `epochs` more epochs than now.

    A job that was put back into the queue may already have completed many.
    """
    reached(out, part, lines(out / "metrics" / f"{part}.jsonl") + epochs)


def commands(text: str, word: str) -> list[str]:
    """Return the shell commands with `word` in a page, or in the comment of a script.

    In a comment, commands are indented by three spaces. What a command does stands behind "  #".
    """
    lines = [
        line.removeprefix("#   ")
        for line in text.splitlines()
        if not line.startswith("#") or line.startswith("#   ")
    ]
    typed = [line.split("  #")[0].strip() for line in lines]
    return [line for line in typed if word in line]


def digest(out: Path) -> str:
    """Return the hash of a run's averaged weights."""
    return str(json.loads((out / "result.json").read_text())["weights_sha256"])


def places(out: Path) -> list[tuple[str, int]]:
    """Return the host and the local rank of each rank."""
    environment = json.loads((out / "environment.json").read_text())
    return [(rank["host"], rank["local_rank"]) for rank in environment["ranks"]]
