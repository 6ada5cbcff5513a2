"""Runs that are killed, stopped, broken and hung, and then resumed.

Some chains of the fault matrix (`make soak`), and cases that it does not hold.
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soak
from launch import BIN, HANG, Finished, command, launch, settings, swap_hpc, wait_for
from safetensors.torch import load_file
from soak_faults import LOST, Outcome
from soak_starts import HERE, Layout, place_for

from swap_hpc.average.agreement import hashed

QUICK = settings("large_batch.epochs=2", "refine.epochs=2", "model.width=4")
ENDLESS = (*QUICK, *settings("refine.epochs=10000"))
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

CHAINS = {
    Layout(4, 2, evaluate_average=1): ("sigterm", "kill_in_save", "kill", "hang", "kill_all"),
    Layout(2, 4): ("exception", "sigusr1", "hang", "kill_in_save", "sigterm"),
    Layout(2, 2): ("torn_file", "disk_full", "two_owners", "host_lost", "torn_file"),
}


def train(out: Path, *fields: str, ranks: int) -> Finished:
    """Train a quick variant of digits on ranks of one thread."""
    options = (*QUICK, *settings(*fields))
    return swap_hpc("train", "digits", *options, "--out", out, ranks=ranks, variables=ONE_THREAD)


def train_into_fault(fault: dict[str, Any], out: Path, *fields: str, ranks: int) -> Finished:
    """Train like `train`, into a fault of faults.py."""
    program = (sys.executable, str(HERE / "faults.py"), json.dumps(fault))
    options = (*QUICK, *settings(*fields))
    line = (*program, "train", "digits", *options, "--out", str(out))
    return command(*line, ranks=ranks, variables=ONE_THREAD)


def lines(out: Path, part: str) -> list[dict[str, Any]]:
    """Return the metrics of a part of a run ("world", "group-000" ...)."""
    text = (out / "metrics" / f"{part}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def parameter(layout: Layout) -> Any:
    """Return a layout as a parameter; `make test-mpi` runs those of two ranks."""
    marks = [pytest.mark.mpi] if layout.ranks == 2 else []
    return pytest.param(layout, marks=marks, id=str(layout))


def test_pieces_of_the_matrix_make_one_table(tmp_path: Path) -> None:
    outcomes = [
        Outcome(Layout(4, 2, 1), "kill", "refine", 0.5),
        Outcome(Layout(1, 1), "kill", "between", 1.5, wrong=["left: a", "left: b"]),
        Outcome(Layout(2, 2), "host_lost", "average", skipped="not root"),
    ]
    for number, outcome in enumerate(outcomes):
        line = f"chain {number:>3}  {soak.line_of(outcome)}"
        (tmp_path / f"{number}.txt").write_text(f"{line}\n\n| a table |\n")
    files = sorted(tmp_path.iterdir())
    program = [sys.executable, str(HERE / "soak.py"), "--of", *map(str, files)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.stdout == f"\n{soak.table(outcomes)}\n" and done.returncode == 1, done.stderr
    assert "| all |  |  |  |  |  | 2 | 1 | 1 |  |" in done.stdout


@pytest.mark.parametrize("layout", [parameter(layout) for layout in CHAINS])
def test_a_run_with_a_fault_at_every_place_ends_like_an_undisturbed_one(
    layout: Layout, tmp_path: Path
) -> None:
    expected = soak.undisturbed(layout, tmp_path)
    kinds = list(CHAINS[layout])
    with place_for(tmp_path / "run") as place:
        outcomes = soak.chain(layout, kinds, random.Random(0), expected, place, timed=False)
        assert [f"{o.place}, {o.kind}: {o.wrong}" for o in outcomes if o.wrong] == []
        assert soak.record(place.out) == expected


def weights(out: Path) -> dict[str, str]:
    """Return the hash of each of a run's models, by file."""
    files = sorted(out.glob("*.safetensors"))
    return {file.name: hashed(load_file(file)).hexdigest() for file in files}


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on 4 ranks."""
    out = tmp_path_factory.mktemp("runs") / "four"
    done = train(out, ranks=4)
    assert done.code == 0, done.stderr
    return out


def stop(out: Path, place: str, step: str, ranks: int, *fields: str) -> None:
    """Train until a SIGTERM at a step of the last rank."""
    fault = {
        "kind": "sigterm",
        "place": place,
        "rank": ranks - 1,
        "mark": str(out.with_suffix(".mark")),
        "step": step,
    }
    done = train_into_fault(fault, out, *fields, ranks=ranks)
    assert done.code == 75, done.stderr


def test_refinement_goes_on_on_fewer_ranks_bit_for_bit(four: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # The share of four ranks. With two ranks it would be refused, but phase 1 is over by then.
    share = "large_batch.batchnorm_batch_size=64"
    stop(out, "refine", "group 3, epoch 2, step 3", 4, share)
    done = train(out, share, ranks=2)
    assert done.code == 0 and "large_batch goes on at its end" in done.stdout, done.stderr
    assert weights(out) == weights(four)
    result = json.loads((out / "result.json").read_text())
    whole = json.loads((four / "result.json").read_text())
    assert (result["ranks"], result["refine_ranks"]) == (4, None)  # refined on 4 and on 2
    timeless = {"refine_ranks": 4, "seconds": 0, "images_per_second": 0, "peak_memory_mib": 0}
    assert result | timeless == whole | timeless


def test_post_local_sgd_that_is_stopped_and_killed_ends_the_same(tmp_path: Path) -> None:
    """Two groups to a rank, stopped at a sync point of the groups and killed between two."""
    fields = ("refine.average_every_steps=5", "checkpoint.snapshots=1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, *fields, ranks=2).code == 0
    stop(parts, "refine", "group 3, epoch 1, step 7", 2, *fields)
    parts.with_suffix(".mark").unlink()
    fault = {
        "kind": "kill",
        "place": "refine",
        "rank": 1,
        "mark": str(tmp_path / "kill.mark"),
        "step": "group 2, epoch 2, step 3",
    }
    assert train_into_fault(fault, parts, *fields, ranks=2).code == LOST
    done = train(parts, *fields, ranks=2)
    assert done.code == 0 and "group 0 goes on after epoch" in done.stdout, done.stderr
    assert weights(parts) == weights(whole)
    snapshots = weights(whole / "snapshots")
    assert weights(parts / "snapshots") == snapshots and len(snapshots) == 2 + 4 * 2
    # A snapshot is the group's own model, before it continues from the average.
    first = [value for name, value in snapshots.items() if name.endswith("-00001.safetensors")]
    assert len(set(first)) == len(first)


def test_refinement_goes_on_on_more_ranks(tmp_path: Path) -> None:
    """Two ranks to a group see the same samples, but round differently.

    The result holds the ranks of phase 1.
    """
    out = tmp_path / "out"
    stop(out, "refine", "group 1, epoch 2, step 3", 2, "groups=2")
    done = train(out, "groups=2", ranks=4)
    assert done.code == 0, done.stderr
    assert "large_batch goes on at its end" in done.stdout
    assert "group 0 goes on after epoch" in done.stdout
    result = json.loads((out / "result.json").read_text())
    assert (result["ranks"], result["refine_ranks"]) == (2, None)
    assert result["epochs"]["refine"] == 2 and result["test_accuracy"]["averaged"] > 0.4
    epochs = [(line["epoch"], line["images"]) for line in lines(out, "group-001")]
    assert epochs == [(1, 1152), (2, 1152)]


def test_phase_1_goes_on_on_other_ranks_and_a_complete_run_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop(out, "large_batch", "epoch 2, step 2", 4)
    done = train(out, ranks=2)
    assert done.code == 0, done.stderr
    assert "large_batch goes on after epoch 1, step 2" in done.stdout
    epochs = [line["epoch"] for line in lines(out, "world") if line["phase"] == "large_batch"]
    assert epochs == [1, 2]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    done = train(out, ranks=2)
    assert done.code == 0 and "holds this run, complete: nothing to do" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def contents(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_other_fields_are_refused_before_anything_is_touched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop(out, "large_batch", "epoch 1, step 2", 2)
    before = contents(out)
    done = train(out, "seed=1", "evaluate.batch_size=9", ranks=2)
    assert done.code == 2
    differ = "holds a run of another recipe (evaluate.batch_size, seed differ)"
    assert done.ours == [f"swap-hpc: {out} {differ}: choose another --out, or remove the folder"]
    assert contents(out) == before


def test_ctrl_c_stops_a_rank_alone_in_order(tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = launch(BIN / "swap-hpc", "train", "digits", *ENDLESS, "--out", out)
    wait_for(lambda: list((out / "checkpoints").glob("group-000-*.safetensors")), "checkpoint")
    os.kill(job.pid, signal.SIGINT)
    output, _ = job.communicate(timeout=HANG)
    assert job.returncode == 75
    saved = f"swap-hpc: stopped on request, all is saved in {out}: start it again to go on"
    assert saved in output


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
    """srun sends one to a rank that is slower to leave than another.

    Python has given up its signal handlers by then.
    """
    (tmp_path / "late.py").write_text(LATE.replace("CODE", str(code)))
    fields = settings("groups=1", "model.name=late:build")
    done = swap_hpc("train", "digits", *QUICK, *fields, cwd=tmp_path)
    assert done.code == code, done.stderr
    assert (tmp_path / "runs" / "digits" / "result.json").exists() == (code == 0)


def remount(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)


def test_a_full_disk_ends_with_one_line_and_loses_nothing(four: Path, small_disk: Path) -> None:
    """The files of 4 groups do not fit. On a larger disk the run resumes from those that did."""
    out = small_disk / "out"
    done = train(out, ranks=4)
    assert done.code == 3 and len(done.ours) == 1, done.stderr
    assert f"cannot write {out}/" in done.ours[0]
    assert done.ours[0].endswith("No space left on device")
    assert (out / "checkpoints").exists() and not (out / "result.json").exists()
    remount(small_disk, "size=20m")
    done = train(out, ranks=4)
    assert done.code == 0 and "warning" not in done.stderr, done.stderr
    assert "large_batch goes on" in done.stdout
    assert weights(out) == weights(four)


def test_a_read_only_folder_gets_one_line(small_disk: Path) -> None:
    remount(small_disk, "ro")
    done = train(small_disk / "out", ranks=2)
    assert done.code == 2
    message = f"cannot write {small_disk}/out: Read-only file system: choose another --out"
    assert done.ours == [f"swap-hpc: {message}"]


def test_a_folder_that_turns_read_only_ends_the_run(small_disk: Path) -> None:
    remount(small_disk, "size=50m")
    out = small_disk / "out"
    job = launch(BIN / "swap-hpc", "train", "digits", *ENDLESS, "--out", out, ranks=2)
    wait_for(lambda: list((out / "checkpoints").glob("group-*.safetensors")), "checkpoint")
    read_only = ["mount", "-o", "remount,ro", str(small_disk)]
    # The kernel refuses as long as a file is open for writing.
    wait_for(
        lambda: subprocess.run(read_only, capture_output=True).returncode == 0,
        "moment without an open file",
        every=0.005,
    )
    try:
        _, errors = job.communicate(timeout=HANG)
    finally:
        job.terminate()
    (line,) = [line for line in errors.splitlines() if line.startswith("swap-hpc: ")]
    assert job.returncode == 3 and line.endswith("Read-only file system"), errors


ALL_WAIT = """
import sys, time
from pathlib import Path
from swap_hpc.train.control import Control
from swap_hpc.parallel.grid import grid
from swap_hpc.parallel.teams import Team
from swap_hpc.run.watchdog import watching

control = Control()
with grid(Team.world(), 2) as ranks, watching(control, 2 / 60, Path(sys.argv[1]), ranks):
    with control.waiting():
        time.sleep(600)
"""


def test_groups_that_all_wait_for_each_other_end(tmp_path: Path) -> None:
    """So it is where their hosts are cut off from each other, and share a folder still."""
    done = command(sys.executable, "-c", ALL_WAIT, tmp_path, ranks=2)
    assert done.code == 3, done.stderr
    lost = "swap-hpc: all groups have waited for each other for 2.4 s: a host, or the network"
    assert len(done.ours) == 1 and done.ours[0].startswith(lost)
