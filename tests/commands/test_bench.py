"""Benches that take seconds: what they count, and how they end."""

import inspect
import json
import sys
import time
from pathlib import Path

import pytest
from launch import Finished, command, swap_hpc

from swap_hpc import __main__ as cli
from swap_hpc.bench.traffic import SETTINGS
from swap_hpc.parallel.launcher import CROWDED

ROOT = Path(__file__).parents[2]
CASE = {"ranks": 2, "width": 4, "samples": 2048}


def measure_case(result: Path, ranks: int, **variables: str) -> Finished:
    """Measure `CASE` as a rank of `swap-hpc bench scaling` does."""
    name = f"scaling:{json.dumps({'case': CASE})}"
    arguments = (sys.executable, "-m", "swap_hpc.bench", name, result)
    return command(*arguments, ranks=ranks, variables=variables, cwd=ROOT)


def test_bytes_are_counted_and_phase_2_sends_none(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    done = measure_case(result, ranks=2, **SETTINGS)
    assert done.code == 0, done.stderr
    case = json.loads(result.read_text(encoding="utf-8"))["case"]
    parameters = case["parameters"]
    sent = {name: phase["bytes"] for name, phase in case["phases"].items()}
    # Each of two ranks sends all float32 gradients once a step. Horovod's negotiation and the sums
    # of the epoch come on top.
    gradients = (2048 // 1024) * 4 * parameters
    assert gradients <= sent["large_batch"] < 1.2 * gradients + 100_000
    assert sent["refine"] == 0
    # The average sends each parameter once, as float64.
    assert 8 * parameters <= sent["average"] < 8.5 * parameters + 20_000
    assert 0 < sent["batchnorm"] < 20_000
    assert case["peak_memory_mib"] > 100


def test_the_set_up_does_not_grow_with_the_ranks_but_for_a_logarithm(tmp_path: Path) -> None:
    few, many = (set_up(tmp_path / f"{ranks}.json", ranks) for ranks in (4, 8))
    # Which ranks pass on what all receive, such as a small data set, is the library's choice: the
    # bytes that a rank sends say nothing.
    for rank in ("median", "most", "received"):
        assert 0 < many["messages"][rank] <= 1.6 * few["messages"][rank], rank
    # Each rank receives the small data set. What comes on top grows by a few numbers, and on the
    # first rank by where each of four more ranks runs, for environment.json.
    more = many["bytes"]["received"] - few["bytes"]["received"]
    assert more <= 4 * 150 + 600


def set_up(result: Path, ranks: int) -> dict[str, dict[str, float]]:
    """Return the messages and bytes of all before Horovod's start, as `bench ranks` does."""
    name = f"ranks:{json.dumps({'case': {'launched': time.time()}})}"
    arguments = (sys.executable, "-m", "swap_hpc.bench", name, result)
    done = command(*arguments, ranks=ranks, variables=SETTINGS, cwd=ROOT)
    assert done.code == 0, done.stderr
    case = json.loads(result.read_text(encoding="utf-8"))["case"]
    assert case["ranks"] == ranks and case["memory_mib"]["peak"] > 100
    # In phase 2 nothing is sent but whether a rank stops, when the groups meet.
    assert case["stages"]["refinement"]["bytes"]["most"] < 100
    return case["stages"]["preparation"]


def test_a_bench_prints_its_table_and_leaves_its_json(tmp_path: Path) -> None:
    done = swap_hpc("bench", "batchnorm", "--out", tmp_path, cwd=ROOT)
    assert done.code == 0, done.stderr
    assert "torch's update_bn on one rank" in done.stdout and "at least 1.8" in done.stdout
    kept = json.loads((tmp_path / "batchnorm.json").read_text(encoding="utf-8"))
    (found,) = kept["comparisons"]
    assert len(found["ours"]) == len(found["peers"]) == 5
    assert min(found["ours"] + found["peers"]) > 0


@pytest.mark.mpi
def test_ranks_are_started_by_a_line_that_every_mpirun_takes() -> None:
    """Ranks may outnumber cores by the environment alone.

    MPICH's mpirun refuses Open MPI's option for that; Open MPI reads variables.
    """
    for command_of in (cli.bench, cli.study):
        assert inspect.signature(command_of).parameters["launcher"].default == "mpirun -n {ranks}"
    refusing = {
        "PRTE_MCA_rmaps_default_mapping_policy": ":nooversubscribe",
        "OMPI_MCA_rmaps_base_oversubscribe": "0",
    }
    started = command(
        sys.executable, "-c", "print('started')", ranks=5, variables=refusing | CROWDED
    )
    # Counted, because launchers mix the ranks' output, and `print` writes a line's end separately.
    assert (started.code, started.stdout.count("started")) == (0, 5), started.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("speed", "no bench 'speed'; choose one of all, loader, decode"),
        ("scaling --set grups=1", "unknown field grups; valid here: "),
        ("scaling --set groups=1", "--set groups: bench scaling varies it itself: leave it out"),
        ("scaling --set refine.epochs=0", "measures both phases: give each an epoch or more"),
        ("scaling --set refine.batch_size=1024", "is not below large_batch.batch_size=1024"),
        ("loop", "no tests/bench/peers.py here: run benches at the top of a checkout"),
    ],
)
def test_what_cannot_be_measured_is_one_line(name: str, message: str, tmp_path: Path) -> None:
    done = swap_hpc("bench", *name.split(), cwd=tmp_path)
    assert done.code == 2, done.stderr
    (line,) = done.ours
    assert message in line


def test_an_mpi_that_does_not_count_is_named(tmp_path: Path) -> None:
    done = measure_case(tmp_path / "result.json", ranks=1)
    assert done.code != 0 and "needs Open MPI with its monitoring component" in done.stderr
