"""Benches that run in seconds: what they count, and how they end."""

import inspect
import json
import sys
from pathlib import Path

import pytest
from launch import command, swap_hpc

from swap_hpc import __main__ as cli
from swap_hpc.bench.traffic import SETTINGS
from swap_hpc.parallel.launcher import CROWDED

ROOT = Path(__file__).parents[2]
CASE = {"ranks": 2, "width": 4, "samples": 2048}


def test_bytes_are_counted_and_phase_2_sends_none(tmp_path: Path) -> None:
    said = tmp_path / "said.json"
    done = command(
        sys.executable,
        "-m",
        "swap_hpc.bench",
        f"scaling:{json.dumps(CASE)}",
        said,
        ranks=2,
        variables=SETTINGS,
        cwd=ROOT,
    )
    assert done.code == 0, done.stderr
    case = json.loads(said.read_text())["case"]
    steps, gradients = 2048 // 1024, 4 * case["parameters"]
    phases = case["phases"]
    # of two ranks each sends all gradients once a step; what Horovod agrees on, and the epoch's own sums, come on top
    assert steps * gradients <= phases["large_batch"]["bytes"] < 1.2 * steps * gradients + 100_000
    assert phases["refine"]["bytes"] == 0
    assert 8 * case["parameters"] <= phases["average"]["bytes"] < 8.5 * case["parameters"] + 20_000
    assert 0 < phases["batchnorm"]["bytes"] < 20_000 and case["peak_memory_mib"] > 100


def test_a_bench_prints_its_table_and_leaves_its_json(tmp_path: Path) -> None:
    done = swap_hpc("bench", "batchnorm", "--out", tmp_path, cwd=ROOT, timeout=300)
    assert done.code == 0, done.stderr
    assert "torch's update_bn on one rank" in done.stdout and "at least 1.8" in done.stdout
    (found,) = json.loads((tmp_path / "batchnorm.json").read_text())["comparisons"]
    assert (
        len(found["ours"]) == len(found["peers"]) == 5 and min(found["ours"] + found["peers"]) > 0
    )


@pytest.mark.mpi
def test_ranks_are_started_by_a_line_that_every_mpirun_takes() -> None:
    """MPICH's refuses Open MPI's options; Open MPI is told by its environment that ranks may outnumber cores."""
    for command_of in (cli.bench, cli.study):
        assert inspect.signature(command_of).parameters["launcher"].default == "mpirun -n {ranks}"
    refusing = {
        "PRTE_MCA_rmaps_default_mapping_policy": ":nooversubscribe",
        "OMPI_MCA_rmaps_base_oversubscribe": "0",
    }
    started = command(
        sys.executable, "-c", "print('started')", ranks=5, variables=refusing | CROWDED
    )
    # Counted: launchers mix what ranks write, and `print` writes a line's end by itself.
    assert (started.code, started.stdout.count("started")) == (0, 5), started.stderr


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    for arguments, message in (
        (("bench", "speed"), "no bench 'speed'; choose one of all, loader, decode"),
        (("bench", "loop"), "no tests/bench/peers.py here: the benches run in a checkout"),
    ):
        done = swap_hpc(*arguments, cwd=tmp_path)
        assert done.code == 2 and len(done.ours) == 1 and message in done.ours[0], done.stderr
    plain = command(
        sys.executable,
        "-m",
        "swap_hpc.bench",
        f"scaling:{json.dumps(CASE)}",
        tmp_path / "x",
        ranks=1,
        cwd=ROOT,
    )
    assert plain.code != 0 and "needs Open MPI with its monitoring component" in plain.stderr
