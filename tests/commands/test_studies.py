"""A small study of real runs: its search, a stop and a second start; a run on another's phase 1."""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from launch import BIN, HANG, launch, swap_hpc, wait_for

STUDY = """
title = "a small study"
recipe = "digits"
ranks = 2
seeds = [0, 1]
set = ["groups=2", "model.width=2", "evaluate.every=0", "large_batch.epochs=2"]
differences = [["SWAP", "groups"]]
[search]
seeds = [5]
set = ["data.validation=100"]
[runs.phase-1]
set = ["refine.epochs=0"]
[runs.swap]
from = "phase-1"
set = ["refine.epochs=1", "refine.learning_rate=[[0, {rate}], [1, 0.0]]"]
rates = [0.05, 0.1]
[runs.post-local]
from = "phase-1"
set = [
    "refine.epochs=1",
    "refine.learning_rate=[[0, {rate}], [1, 0.0]]",
    "refine.average_every_steps=4",
]
rates = [0.1]
[[rows]]
method = "groups"
run = "swap"
model = "mean_of_groups"
[[rows]]
method = "SWAP"
run = "swap"
[[rows]]
method = "post-local SGD"
run = "post-local"
"""


def sets(*fields: str) -> list[str]:
    """Return the arguments that set fields of a recipe."""
    return [part for field in fields for part in ("--set", field)]


def begun(process: "subprocess.Popen[str]", condition: Callable[[], object]) -> None:
    """Wait until a trial has begun, and fail with what the study prints if it ends before."""

    def begun_or_ended() -> bool:
        return bool(condition()) or process.poll() is not None

    wait_for(begun_or_ended, "trial")
    assert condition(), process.stderr and process.stderr.read()


def test_a_study_is_stopped_goes_on_and_is_not_run_twice(tmp_path: Path) -> None:
    file, out = tmp_path / "small.toml", tmp_path / "out"
    file.write_text(STUDY)
    process = launch(BIN / "swap-hpc", "study", file, "--out", out)
    last_trial = out / "search" / "swap" / "rate-0.1-seed-5"
    begun(process, lambda: (last_trial / "recipe.toml").is_file())
    process.send_signal(signal.SIGINT)  # as a terminal's Ctrl-C
    stdout, stderr = process.communicate(timeout=HANG)
    assert process.returncode == 75, stderr
    assert "search 3 of 3: swap, seed 5, rate 0.1" in stdout
    assert "start it again to go on" in stdout + stderr
    done = swap_hpc("study", file, "--out", out)
    assert done.code == 0, done.stderr
    assert "search 3 of 3" in done.stdout and "search 2 of 3" not in done.stdout
    assert "run 6 of 6: post-local, seed 1" in done.stdout
    table = (out / "study.md").read_text()
    assert "| SWAP - groups |" in table and "over 2 seeds" in table
    shown = table.replace("\n![accuracy of every row](study.png)\n", "")
    assert shown in done.stdout
    assert len(json.loads((out / "study.json").read_text())["rows"]) == 3
    again = swap_hpc("study", file, "--out", out)
    assert again.code == 0 and "run 1 of 6" not in again.stdout and "| SWAP " in again.stdout


def test_a_stop_counts_where_the_launcher_returns_0(tmp_path: Path) -> None:
    """MPICH's mpirun may: the run that was stopped has no result."""
    launcher = tmp_path / "launcher"
    launcher.write_text(
        '#!/bin/bash\nmpirun "$@" &\ntrap "kill -USR1 $!" USR1\nwait $!; wait $!\nexit 0\n'
    )
    launcher.chmod(0o755)
    file, out = tmp_path / "small.toml", tmp_path / "out"
    file.write_text(STUDY.replace("large_batch.epochs=2", "large_batch.epochs=10000"))
    start = f"{launcher} -n {{ranks}}"
    process = launch(BIN / "swap-hpc", "study", file, "--out", out, "--launcher", start)
    begun(process, lambda: list(out.glob("search/*/*/metrics/world.jsonl")))
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=HANG)
    assert process.returncode == 75, stderr
    assert "the study was stopped on request, all is saved" in stdout + stderr


def test_another_runs_phase_1_gives_what_ones_own_gives(tmp_path: Path) -> None:
    fields = sets("groups=2", "model.width=2", "large_batch.epochs=2", "evaluate.every=0")
    first, whole, second = (tmp_path / name for name in ("first", "whole", "second"))
    plain, refined = sets("refine.epochs=0"), sets("refine.epochs=1")
    assert swap_hpc("train", "digits", *fields, *plain, "--out", first, ranks=2).code == 0
    assert swap_hpc("train", "digits", *fields, *refined, "--out", whole, ranks=2).code == 0
    further = ("--out", second, "--from", first)
    done = swap_hpc("train", "digits", *fields, *refined, *further, ranks=2)
    assert done.code == 0 and "large_batch goes on at its end" in done.stdout, done.stderr
    one, own, other = (
        json.loads((out / "result.json").read_text()) for out in (first, whole, second)
    )
    assert own["weights_sha256"] == other["weights_sha256"]
    assert own["test_accuracy"] == other["test_accuracy"]
    assert other["seconds"]["large_batch"] == one["seconds"]["large_batch"]


def test_a_phase_1_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    fields = sets("model.width=2", "large_batch.epochs=1", "evaluate.every=0")
    plain = sets("refine.epochs=0")
    assert swap_hpc("train", "digits", *fields, *plain, "--out", first, ranks=2).code == 0
    for changed, start, message in (
        ("seed=1", first, "its phase 1 was another (seed differ)"),
        ("large_batch.epochs=2", first, "its phase 1 was another (large_batch.epochs differ)"),
        ("refine.epochs=1", tmp_path / "nowhere", "is not a run's folder"),
    ):
        changes = sets(changed)
        further = ("--out", second, "--from", start)
        done = swap_hpc("train", "digits", *fields, *changes, *further, ranks=2)
        assert done.code == 2 and len(done.ours) == 1 and message in done.ours[0], done.stderr


def test_a_launcher_that_cannot_be_started_is_refused(tmp_path: Path) -> None:
    file, out = tmp_path / "small.toml", tmp_path / "out"
    file.write_text(STUDY)
    for launcher, message in (
        ("nowhere -n {ranks}", "no nowhere on the PATH"),
        ("mpirun -n {rank}", "write it as 'mpirun -n {ranks}'"),
    ):
        done = swap_hpc("study", file, "--out", out, "--launcher", launcher)
        assert done.code == 2 and len(done.ours) == 1 and message in done.ours[0], done.stderr
