"""Runs that are killed, stopped, broken and hung, and go on: a part of the matrix of `make soak`, and what is around it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import soak
from launch import BIN, command, launch, swap_hpc
from safetensors.torch import load_file
from soak import HERE, Layout

from swap_hpc.average.agreement import hashed

QUICK = ("--set", "large_batch.epochs=2", "--set", "refine.epochs=2", "--set", "model.width=4")
ENDLESS = (*QUICK, "--set", "refine.epochs=10000")

CHAINS = {
    Layout(4, 2, evaluate_average=1): ("sigterm", "kill_in_save", "kill", "hang", "kill_all"),
    Layout(2, 4): ("exception", "sigusr1", "hang", "kill_in_save", "sigterm"),
}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(each, marks=[pytest.mark.mpi] if each.ranks == 2 else [], id=str(each))
        for each in CHAINS
    ],
)
def test_what_met_a_fault_at_every_place_ends_as_if_it_had_not(
    layout: Layout, tmp_path: Path
) -> None:
    expected = soak.undisturbed(layout, tmp_path)
    outcomes = soak.chain(
        layout, list(CHAINS[layout]), random.Random(0), expected, tmp_path / "run", patience=3
    )
    assert [f"{o.place}, {o.kind}: {o.wrong}" for o in outcomes if o.wrong] == []
    assert soak.record(tmp_path / "run") == expected


def weights(out: Path) -> dict[str, str]:
    """File -> hash of a run's models."""
    return {
        path.name: hashed(load_file(path)).hexdigest() for path in sorted(out.glob("*.safetensors"))
    }


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on 4 ranks."""
    out = tmp_path_factory.mktemp("runs") / "four"
    done = swap_hpc(
        "train", "digits", *QUICK, "--out", out, ranks=4, variables={"OMP_NUM_THREADS": "1"}
    )
    assert done.code == 0, done.stderr
    return out


def stopped(out: Path, place: str, step: str, ranks: int, *more: str) -> None:
    """A run that was stopped at a step of its last rank."""
    fault = {
        "kind": "sigterm",
        "place": place,
        "rank": ranks - 1,
        "mark": str(out.with_suffix(".mark")),
        "step": step,
    }
    line: tuple[str | Path, ...] = (
        sys.executable,
        HERE / "faults.py",
        json.dumps(fault),
        "train",
        "digits",
        *QUICK,
        *more,
        "--out",
        out,
    )
    done = command(*line, ranks=ranks, variables={"OMP_NUM_THREADS": "1"})
    assert done.code == 75, done.stderr


def test_refinement_goes_on_on_fewer_ranks_to_the_bit(four: Path, tmp_path: Path) -> None:
    share = (
        "--set",
        "large_batch.batchnorm_batch_size=64",
    )  # of four ranks: phase 1 is over when there are two
    stopped(tmp_path / "out", "refine", "group 3, epoch 2, step 3", 4, *share)
    done = swap_hpc(
        "train",
        "digits",
        *QUICK,
        *share,
        "--out",
        tmp_path / "out",
        ranks=2,
        variables={"OMP_NUM_THREADS": "1"},
    )
    assert done.code == 0 and "large_batch goes on at its end" in done.stdout, done.stderr
    assert weights(tmp_path / "out") == weights(four)
    result, whole = (
        json.loads((out / "result.json").read_text()) for out in (tmp_path / "out", four)
    )
    assert (result["ranks"], result["refine_ranks"]) == (4, None)  # refined on 4 and on 2
    timeless = {"refine_ranks": 4, "seconds": 0, "images_per_second": 0, "peak_memory_mib": 0}
    assert result | timeless == whole | timeless


def test_post_local_sgd_that_is_stopped_and_killed_ends_the_same(tmp_path: Path) -> None:
    """Two groups to a rank: stopped where the groups meet, and killed between their meetings."""
    fields = ("--set", "refine.average_every_steps=5", "--set", "checkpoint.snapshots=1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert (
        swap_hpc(
            "train",
            "digits",
            *QUICK,
            *fields,
            "--out",
            whole,
            ranks=2,
            variables={"OMP_NUM_THREADS": "1"},
        ).code
        == 0
    )
    stopped(parts, "refine", "group 3, epoch 1, step 7", 2, *fields)
    parts.with_suffix(".mark").unlink()
    fault = {
        "kind": "kill",
        "place": "refine",
        "rank": 1,
        "mark": str(tmp_path / "kill.mark"),
        "step": "group 2, epoch 2, step 3",
    }
    line = (
        sys.executable,
        HERE / "faults.py",
        json.dumps(fault),
        "train",
        "digits",
        *QUICK,
        *fields,
        "--out",
        parts,
    )
    assert command(*line, ranks=2, variables={"OMP_NUM_THREADS": "1"}).code == soak.LOST
    done = swap_hpc(
        "train",
        "digits",
        *QUICK,
        *fields,
        "--out",
        parts,
        ranks=2,
        variables={"OMP_NUM_THREADS": "1"},
    )
    assert done.code == 0 and "group 0 goes on after epoch" in done.stdout, done.stderr
    assert weights(parts) == weights(whole)
    assert (
        weights(parts / "snapshots") == weights(whole / "snapshots")
        and len(weights(parts / "snapshots")) == 2 + 4 * 2
    )
    snapshots = {
        name: value
        for name, value in weights(whole / "snapshots").items()
        if name.endswith("-00001.safetensors")
    }
    assert len(set(snapshots.values())) == len(
        snapshots
    )  # each group's own, before they go on from their average


def test_refinement_goes_on_on_more_ranks(tmp_path: Path) -> None:
    """Two to a group then: not the same to the bit, but the same samples. The result tells the ranks of phase 1."""
    stopped(tmp_path / "out", "refine", "group 1, epoch 2, step 3", 2, "--set", "groups=2")
    done = swap_hpc(
        "train", "digits", *QUICK, "--set", "groups=2", "--out", tmp_path / "out", ranks=4
    )
    assert (
        done.code == 0
        and "large_batch goes on at its end" in done.stdout
        and "group 0 goes on after epoch" in done.stdout
    ), done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (
        (result["ranks"], result["refine_ranks"]) == (2, None)
        and result["epochs"]["refine"] == 2
        and result["test_accuracy"]["averaged"] > 0.4
    )
    lines = [
        json.loads(line)
        for line in (tmp_path / "out" / "metrics" / "group-001.jsonl").read_text().splitlines()
    ]
    assert [(line["epoch"], line["images"]) for line in lines] == [(1, 1152), (2, 1152)]


def test_phase_1_goes_on_on_other_ranks_and_a_complete_run_is_left_alone(tmp_path: Path) -> None:
    stopped(tmp_path / "out", "large_batch", "epoch 2, step 2", 4)
    done = swap_hpc("train", "digits", *QUICK, "--out", tmp_path / "out", ranks=2)
    assert done.code == 0 and "large_batch goes on after epoch 1, step 2" in done.stdout, (
        done.stderr
    )
    first = [
        json.loads(line)
        for line in (tmp_path / "out" / "metrics" / "world.jsonl").read_text().splitlines()
    ]
    assert [line["epoch"] for line in first if line["phase"] == "large_batch"] == [1, 2]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    done = swap_hpc("train", "digits", *QUICK, "--out", tmp_path / "out", ranks=2)
    assert done.code == 0 and "holds this run, complete: nothing to do" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_other_fields_are_refused_before_anything_is_touched(tmp_path: Path) -> None:
    stopped(tmp_path / "out", "large_batch", "epoch 1, step 2", 2)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    done = swap_hpc(
        "train",
        "digits",
        *QUICK,
        "--set",
        "seed=1",
        "--set",
        "evaluate.batch_size=9",
        "--out",
        tmp_path / "out",
        ranks=2,
    )
    assert done.code == 2
    says = "holds a run of another recipe (evaluate.batch_size, seed differ): choose another --out, or remove the folder"
    assert done.ours == [f"swap-hpc: {tmp_path / 'out'} {says}"]
    assert before == {
        path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }


def test_ctrl_c_stops_a_rank_alone_in_order(tmp_path: Path) -> None:
    job = launch(BIN / "swap-hpc", "train", "digits", *ENDLESS, "--out", tmp_path / "out")
    wait_for(lambda: list((tmp_path / "out" / "checkpoints").glob("group-000-*.safetensors")))
    os.kill(job.pid, signal.SIGINT)
    output, _ = job.communicate(timeout=20)
    assert job.returncode == 75
    assert (
        f"swap-hpc: stopped on request, all is saved in {tmp_path / 'out'}: start it again to go on"
        in output
    )


LATE = """
import os, signal
from swap_hpc.train import models

class Late:
    def __del__(self, kill=os.kill, own=os.getpid(), number=signal.SIGTERM):
        kill(own, number)

late = Late()  # lives until Python unloads its modules

def build(**arguments):
    model = models.ResNet9(**arguments)
    if CODE == 2:
        raise ValueError("no such model")
    if CODE == 75:
        model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    return model
"""


@pytest.mark.parametrize("code", [0, 2, 75])
def test_a_signal_at_the_very_end_changes_no_code(code: int, tmp_path: Path) -> None:
    """As srun's to a rank that is slower to leave than another: Python has given up its handlers by then."""
    (tmp_path / "late.py").write_text(LATE.replace("CODE", str(code)))
    done = swap_hpc(
        "train",
        "digits",
        *QUICK,
        "--set",
        "groups=1",
        "--set",
        "model.name=late:build",
        cwd=tmp_path,
    )
    assert done.code == code, done.stderr
    assert (tmp_path / "runs" / "digits" / "result.json").exists() == (code == 0)


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def remount(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)


def test_a_full_disk_ends_with_one_line_and_loses_nothing(four: Path, small_disk: Path) -> None:
    """4 groups' files do not fit; on a larger disk the run goes on from what did."""
    done = swap_hpc(
        "train",
        "digits",
        *QUICK,
        "--out",
        small_disk / "out",
        ranks=4,
        variables={"OMP_NUM_THREADS": "1"},
    )
    assert done.code == 3 and len(done.ours) == 1, done.stderr
    assert f"cannot write {small_disk / 'out'}/" in done.ours[0] and done.ours[0].endswith(
        "No space left on device"
    )
    assert (small_disk / "out" / "checkpoints").exists() and not (
        small_disk / "out" / "result.json"
    ).exists()
    remount(small_disk, "size=20m")
    done = swap_hpc(
        "train",
        "digits",
        *QUICK,
        "--out",
        small_disk / "out",
        ranks=4,
        variables={"OMP_NUM_THREADS": "1"},
    )
    assert (
        done.code == 0 and "large_batch goes on" in done.stdout and "warning" not in done.stderr
    ), done.stderr
    assert weights(small_disk / "out") == weights(four)


def test_a_read_only_folder_is_answered_in_one_line(small_disk: Path) -> None:
    remount(small_disk, "ro")
    done = swap_hpc("train", "digits", *QUICK, "--out", small_disk / "out", ranks=2)
    assert done.code == 2
    assert done.ours == [
        f"swap-hpc: cannot write {small_disk}/out: Read-only file system: choose another --out"
    ]


def test_a_folder_that_turns_read_only_ends_the_run(small_disk: Path) -> None:
    remount(small_disk, "size=50m")
    job = launch(
        BIN / "swap-hpc", "train", "digits", *ENDLESS, "--out", small_disk / "out", ranks=2
    )
    wait_for(lambda: list((small_disk / "out" / "checkpoints").glob("group-*.safetensors")))
    deadline = time.monotonic() + 30
    while (
        subprocess.run(["mount", "-o", "remount,ro", small_disk], capture_output=True).returncode
        and time.monotonic() < deadline
    ):
        time.sleep(0.005)  # not while a file is open for writing
    try:
        _, errors = job.communicate(timeout=30)
    finally:
        job.terminate()
    lines = [line for line in errors.splitlines() if line.startswith("swap-hpc: ")]
    assert job.returncode == 3 and len(lines) == 1 and lines[0].endswith("Read-only file system"), (
        errors
    )
