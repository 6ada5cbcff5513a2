"""What the parts cost, each beside what a user would pick instead, in one run. Peers stand in `tests/bench/peers`, in a checkout."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.atomic import write_json
from swap_hpc.parallel.launcher import CROWDED, launch_line

PEERS = Path("tests/bench/peers.py")


@dataclass(frozen=True)
class Bench:
    where: str  # module and function
    ranks: tuple[int, ...]
    what: str


BENCHES = {
    "loader": Bench(
        "loading:in_memory",
        (1,),
        "CIFAR's augmentation in memory: DALI beside a DataLoader, and plain torch",
    ),
    "decode": Bench(
        "loading:from_files",
        (1,),
        "JPEG files, random resized crops: DALI beside ImageFolder and DataLoader",
    ),
    "step": Bench(
        "training:step", (2,), "a step of phase 1: Horovod beside DistributedDataParallel"
    ),
    "overhead": Bench(
        "overhead:overhead",
        (1,),
        "what a step costs on the host beside the model's own work, in microseconds",
    ),
    "loop": Bench("training:loop", (1,), "fit() beside a bare loop"),
    "refine": Bench(
        "training:refine", (2,), "a rank that refines among others beside a rank alone"
    ),
    "average": Bench("averages:average", (2, 4), "averaged weights beside a bare allreduce"),
    "batchnorm": Bench(
        "averages:batchnorm", (2,), "the batch-norm refresh beside torch's update_bn"
    ),
    "start": Bench("starting:start", (1,), "launch to first step beside import torch"),
}

NAMES = {
    **{name: bench.what for name, bench in BENCHES.items()},
    "scaling": "seconds, bytes sent and memory of each phase against ranks, model and data",
    "checkpoint": "what saving costs: seconds, and the share of a run of a recipe, on the ranks that you start",
}


def run(names: Sequence[str], launcher: str, out: Path | None, tell: Callable[[str], None]) -> bool:
    """Runs benches, each under a launch of its own, prints one table, and writes its JSON into `out`. Returns whether all bars are met."""
    from swap_hpc.bench.measure import Comparison, table

    if not PEERS.is_file():
        raise UserError(
            f"no {PEERS} here: the benches run in a checkout of the source, beside their peers"
        )
    rows: list[dict[str, Any]] = []
    host: dict[str, Any] = {}
    for name in names:
        for ranks in BENCHES[name].ranks:
            tell(f"{name}, {ranks} rank{'s' * (ranks > 1)}: {BENCHES[name].what}")
            said = _launched(name, ranks, launcher)
            rows, host = rows + said["comparisons"], said["machine"]
    kept = Comparison.__dataclass_fields__
    comparisons = [
        Comparison(**{key: value for key, value in row.items() if key in kept}) for row in rows
    ]
    cores = f"{host['cores']} cores of {host['cpu']}, {host['gpu'] or 'GPU: not measured: no GPU'}"
    tell(f"\n{table(comparisons)}\n\n{cores}, Python {host['python']}, torch {host['torch']}")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {"machine": host, "comparisons": rows})
    missed = [each for each in comparisons if each.met is False]
    tell(
        "all bars are met"
        if not missed
        else f"missed: {', '.join(sorted({each.bench for each in missed}))}"
    )
    return not missed


def _launched(name: str, ranks: int, launcher: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said.json"
        line = [
            *launch_line(launcher, ranks),
            sys.executable,
            "-m",
            "swap_hpc.bench",
            name,
            str(said),
        ]
        code = subprocess.run(
            line,
            env=CROWDED | dict(os.environ) | {"SWAP_HPC_BENCH_LAUNCHER": launcher},
            check=False,
        ).returncode
        if code or not said.is_file():
            raise RunError(f"bench {name} ended with {code}: {' '.join(line)}")
        return json.loads(said.read_text(encoding="utf-8"))


def scale(launcher: str, out: Path, tell: Callable[[str], None]) -> None:
    """Runs the cases of `scaling`, prints a table, and writes it as JSON and as a figure into the folder `out`."""
    from swap_hpc.bench import scaling
    from swap_hpc.bench.traffic import SETTINGS

    os.environ.update(SETTINGS)
    # the same on any number of ranks, for the cases to be comparable
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or "1"
    cases: list[dict[str, Any]] = []
    host: dict[str, Any] = {}
    for case in scaling.CASES:
        tell("scaling: " + ", ".join(f"{value:,} {name}" for name, value in case.items()))
        said = _launched(f"scaling:{json.dumps(case)}", case["ranks"], launcher)
        cases, host = [*cases, said["case"]], said["machine"]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "scaling.json", {"machine": host, "cases": cases})
    scaling.figure(cases, host["cores"], out / "scaling.png")
    tell(
        f"\n{scaling.table(cases)}\n\n{host['cores']} cores of {host['cpu']}: with more ranks than cores, several share one"
    )


def work(name: str, said: Path) -> None:
    """One bench, on one of its ranks."""
    from swap_hpc.bench.measure import as_json, machine
    from swap_hpc.parallel.teams import Team

    world = Team.world()
    if name.startswith("scaling:"):
        from swap_hpc.bench import scaling

        case = scaling.measure(world, json.loads(name.removeprefix("scaling:")))
        world.first(
            lambda: said.write_text(
                json.dumps({"machine": machine(), "case": case}), encoding="utf-8"
            )
        )
        return
    module, _, function = BENCHES[name].where.partition(":")
    compare = getattr(importlib.import_module(f"swap_hpc.bench.{module}"), function)
    comparisons = compare(world, _peers())
    found = json.dumps({"machine": machine(), "comparisons": as_json(comparisons)})
    world.first(lambda: said.write_text(found, encoding="utf-8"))


def _peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", PEERS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers"] = module  # a DataLoader's workers find it there
    spec.loader.exec_module(module)
    return module
