"""What parts of the program cost, each beside what one would use instead.

The alternatives are in `tests/bench/peers.py`, so that benches run in a checkout of the source.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.atomic import write_json
from swap_hpc.parallel.launcher import CROWDED, launch_line
from swap_hpc.recipe.wording import count

# Modules that import torch or MPI are imported inside the functions that need them: the command
# line lists the benches without.

PEERS = Path("tests/bench/peers.py")


@dataclass(frozen=True)
class Bench:
    """A bench and how it is started."""

    where: str  # module and function
    ranks: tuple[int, ...]  # numbers of ranks, each in its own launch
    what: str


BENCHES = {
    "loader": Bench(
        where="loading:in_memory",
        ranks=(1,),
        what="CIFAR's augmentation in memory: DALI beside a DataLoader, and plain torch",
    ),
    "decode": Bench(
        where="loading:from_files",
        ranks=(1,),
        what="JPEG files, random resized crops: DALI beside ImageFolder and DataLoader",
    ),
    "step": Bench(
        where="training:step",
        ranks=(2,),
        what="a step of phase 1: Horovod beside DistributedDataParallel",
    ),
    "overhead": Bench(
        where="overhead:overhead",
        ranks=(1,),
        what="the host's microseconds per step of fit(), beside those of a bare loop",
    ),
    "loop": Bench(
        where="training:loop",
        ranks=(1,),
        what="fit() beside a bare loop",
    ),
    "refine": Bench(
        where="training:refine",
        ranks=(2,),
        what="a rank that refines among others beside a rank alone",
    ),
    "average": Bench(
        where="averages:average",
        ranks=(2, 4),
        what="averaged weights beside a bare allreduce",
    ),
    "batchnorm": Bench(
        where="averages:batchnorm",
        ranks=(2,),
        what="the batch-norm refresh beside torch's update_bn",
    ),
    "start": Bench(
        where="starting:start",
        ranks=(1,),
        what="launch to first step beside import torch",
    ),
}

NAMES = {
    **{name: bench.what for name, bench in BENCHES.items()},
    "scaling": "seconds, bytes sent and memory of each phase against ranks, model and data",
    "ranks": "seconds, messages, bytes and memory of the set-up, against the number of ranks",
    "checkpoint": "seconds of saving, and their share of a recipe's run, on the ranks you start",
}


def run(names: Sequence[str], launcher: str, out: Path | None, tell: Callable[[str], None]) -> bool:
    """Run benches, print one table of all their comparisons, and write them as JSON.

    Args:
        names: keys of `BENCHES`.
        launcher: the command that starts ranks; `{ranks}` in it stands for their number.
        out: the JSON file to write; None for none.
        tell: prints a line.

    Returns:
        True if all bars are met.

    Raises:
        UserError: the alternatives are not here, or the launcher is not on the PATH.
        RunError: a bench failed.
    """
    from swap_hpc.bench.measure import from_json, table

    if not PEERS.is_file():
        raise UserError(f"no {PEERS} here: run benches at the top of a checkout of the source")
    rows: list[dict[str, Any]] = []
    host: dict[str, Any] = {}
    for name in names:
        bench = BENCHES[name]
        for ranks in bench.ranks:
            tell(f"{name}, {count(ranks, 'rank')}: {bench.what}")
            result = _launched(name, ranks, launcher)
            rows += result["comparisons"]
            host = result["machine"]
    comparisons = from_json(rows)
    cores = f"{count(host['cores'], 'core')} of {host['cpu']}, {host['gpu'] or 'no GPU'}"
    tell(f"\n{table(comparisons)}\n\n{cores}, Python {host['python']}, torch {host['torch']}")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {"machine": host, "comparisons": rows})
    missed = sorted({each.bench for each in comparisons if each.met is False})
    tell(f"missed: {', '.join(missed)}" if missed else "all bars are met")
    return not missed


def _launched(name: str, ranks: int, launcher: str) -> dict[str, Any]:
    """Run `work` on new ranks, and return the result that it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        line = [
            *launch_line(launcher, ranks),
            sys.executable,
            "-m",
            "swap_hpc.bench",
            name,
            str(result),
        ]
        # The user's own settings come after CROWDED, which lets ranks outnumber cores.
        variables = CROWDED | dict(os.environ) | {"SWAP_HPC_BENCH_LAUNCHER": launcher}
        code = subprocess.run(line, env=variables, check=False).returncode
        if code or not result.is_file():
            raise RunError(f"bench {name} ended with exit code {code}: {' '.join(line)}")
        return json.loads(result.read_text(encoding="utf-8"))


def scale(launcher: str, out: Path, overrides: Sequence[str], tell: Callable[[str], None]) -> None:
    """Measure the cases of `scaling`, print their table, and write it as JSON and as a figure.

    Args:
        launcher: the command that starts ranks; `{ranks}` in it stands for their number.
        out: the folder for `scaling.json` and `scaling.png`.
        overrides: of the recipe that is measured, such as "precision=bf16".
        tell: prints a line.

    Raises:
        UserError: the overrides are wrong, or the launcher is not on the PATH.
        RunError: a case failed.
    """
    from swap_hpc.bench import scaling
    from swap_hpc.bench.scaling_figure import draw_scaling
    from swap_hpc.bench.traffic import SETTINGS

    scaling.check_overrides(overrides)
    os.environ.update(SETTINGS)
    # One thread on any number of ranks, unless the user chose another, keeps the cases comparable.
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or "1"
    cases: list[dict[str, Any]] = []
    host: dict[str, Any] = {}
    for case in scaling.CASES:
        tell("scaling: " + ", ".join(f"{name} {value:,}" for name, value in case.items()))
        what = json.dumps({"case": case, "overrides": [*overrides]})
        result = _launched(f"scaling:{what}", case["ranks"], launcher)
        cases.append(result["case"])
        host = result["machine"]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "scaling.json", {"machine": host, "overrides": [*overrides], "cases": cases})
    where = scaling.where(cases, host["cores"])
    draw_scaling(cases, where, out / "scaling.png")
    tell(f"\n{scaling.table(cases)}\n\n{host['cpu']}; {where}")


def grow(launcher: str, out: Path, tell: Callable[[str], None]) -> None:
    """Measure the set-up on more and more ranks, print what grows, and write it as JSON.

    It ends at the first number of ranks for which the host's memory is too small.

    Args:
        launcher: the command that starts ranks; `{ranks}` in it stands for their number.
        out: the folder for `ranks.json`.
        tell: prints a line.
    """
    from swap_hpc.bench import ranks as growth
    from swap_hpc.bench.traffic import SETTINGS

    os.environ.update(SETTINGS)
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or "1"
    out.mkdir(parents=True, exist_ok=True)
    cases: list[dict[str, Any]] = []
    host: dict[str, Any] = {}
    for number in growth.NUMBERS:
        if cases and not growth.fits(number, cases[-1]):
            tell(f"ranks: {number} need more memory than is free here")
            break
        tell(f"ranks: {number}")
        case = json.dumps({"case": {"launched": time.time()}})
        result = _launched(f"ranks:{case}", number, launcher)
        cases.append(result["case"])
        host = result["machine"]
        # after each case: the next one may fail for want of memory
        write_json(out / "ranks.json", {"machine": host, "cases": cases})
    tell(f"\n{growth.table(cases)}\n\n{growth.laws(cases)}")
    tell(f"\n{count(host['cores'], 'core')} of {host['cpu']}: with more ranks, several share one")


def work(name: str, result: Path) -> None:
    """Run one bench on this rank; the first rank writes what it found.

    Args:
        name: a key of `BENCHES`, or "scaling:" or "ranks:" and the arguments of its `measure` as
            JSON.
        result: the JSON file to write.
    """
    from swap_hpc.bench.measure import as_json, machine
    from swap_hpc.parallel.teams import Team

    world = Team.world()
    found: dict[str, Any]
    if ":" in name:
        module, _, arguments = name.partition(":")
        measure = importlib.import_module(f"swap_hpc.bench.{module}").measure
        found = {"case": measure(world, **json.loads(arguments))}
    else:
        module, _, function = BENCHES[name].where.partition(":")
        compare = getattr(importlib.import_module(f"swap_hpc.bench.{module}"), function)
        found = {"comparisons": as_json(compare(world, _peers()))}
    world.first(
        lambda: result.write_text(json.dumps({"machine": machine()} | found), encoding="utf-8")
    )


def _peers() -> ModuleType:
    """Import the alternatives from the file, which is in no package."""
    spec = importlib.util.spec_from_file_location("peers", PEERS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # The workers of a DataLoader import their data set's class by the module's name.
    sys.modules["peers"] = module
    spec.loader.exec_module(module)
    return module
