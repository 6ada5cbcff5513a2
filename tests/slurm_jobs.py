"""Jobs on the two-node cluster, as a user submits them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cluster_of_two import ROOT, Cluster, wait_for

TESTS = Path(__file__).parent
SMALL = ("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")  # of a node
TWO_NODES = ("--nodes=2", *SMALL)


def user_folder(folder: Path) -> Path:
    """To call sbatch in: with the batch scripts as they are shipped, without this checkout's own settings."""
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
    """The number of the job."""
    return int(
        cluster.run("sbatch", "--parsable", *options, script, *line, variables=variables, cwd=home)
    )


def complete(cluster: Cluster, job: int, out: Path, seconds: float = 300) -> dict[str, Any]:
    """What a job's run ended with; fails where the job did not end well."""
    (ended,) = cluster.wait(job, seconds)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), output(ended)
    return json.loads((out / "result.json").read_text())


def output(job: dict[str, str]) -> str:
    return Path(job["StdOut"]).read_text(encoding="utf-8")


def lines(file: Path) -> int:
    """Epochs that a file of metrics tells of."""
    return file.read_text(encoding="utf-8").count("\n") if file.exists() else 0


def read_lines(out: Path, part: str) -> list[dict[str, Any]]:
    """What a run's metrics tell of a part ("world", "group-000" ...)."""
    return [
        json.loads(line) for line in (out / "metrics" / f"{part}.jsonl").read_text().splitlines()
    ]


def reached(out: Path, part: str, epochs: int, seconds: float = 120) -> None:
    """Waits until a part of a run ("world", "group-000" ...) is that far."""
    wait_for(
        lambda: lines(out / "metrics" / f"{part}.jsonl") >= epochs,
        f"epoch {epochs} of {part} in {out}",
        seconds,
        every=0.02,
    )


def further(out: Path, part: str, epochs: int) -> None:
    """Waits until a part of a run is that many epochs further than now: a job that is put back may already be far."""
    reached(out, part, lines(out / "metrics" / f"{part}.jsonl") + epochs)


def commands(text: str, word: str) -> list[str]:
    """The lines of a text, or of a script's comment, that are shell commands with `word` in them, as one types them."""
    typed = [
        line.removeprefix("#   ").split("  #")[0].strip()
        for line in text.splitlines()
        if line[:1] != "#" or line.startswith("#   ")
    ]
    return [line for line in typed if word in line]


def digest(out: Path) -> str:
    return str(json.loads((out / "result.json").read_text())["weights_sha256"])


def places(out: Path) -> list[tuple[str, int]]:
    """Host and local rank of each rank."""
    return [
        (rank["host"], rank["local_rank"])
        for rank in json.loads((out / "environment.json").read_text())["ranks"]
    ]
