"""A run by several jobs, each of which does one part of it: `train --phase`."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from launch import BIN, HANG, launch, settings, swap_hpc, wait_for

QUICK = settings("large_batch.epochs=2", "refine.epochs=2", "model.width=4")


def kept(out: Path) -> dict[str, Any]:
    """Return what in a result does not depend on times, memory and jobs."""
    result = json.loads((out / "result.json").read_text())
    others = ("seconds", "images_per_second", "peak_memory_mib", "refine_ranks")
    return {name: value for name, value in result.items() if name not in others}


@pytest.mark.parametrize("per_group", [1, 2])
def test_a_job_for_each_part_gives_what_one_job_gives(per_group: int, tmp_path: Path) -> None:
    """The weights are equal bit for bit.

    The groups' jobs run at the same time, and one of them is killed and started again.
    """
    quick = (*QUICK, *settings("groups=2"))
    ranks = 2 * per_group
    whole = swap_hpc("train", "digits", *quick, "--out", tmp_path / "whole", ranks=ranks)
    assert whole.code == 0, whole.stderr

    out = tmp_path / "parts"
    job = ("train", "digits", *quick, "--out", str(out))
    first = swap_hpc(*job, "--phase", "large_batch", ranks=ranks)
    assert first.code == 0, first.stderr
    assert f"large_batch is done, for the run in {out}" in first.stdout
    world = (out / "metrics" / "world.jsonl").read_text()
    jobs = [
        launch(BIN / "swap-hpc", *job, "--phase", "refine", "--group", str(g), ranks=per_group)
        for g in range(2)
    ]
    wait_for(lambda: list(out.glob("checkpoints/group-001-*")), "checkpoint of group 1", every=0.01)
    os.killpg(jobs[1].pid, signal.SIGKILL)
    assert "group-000 is done" in jobs[0].communicate(timeout=HANG)[0] and jobs[0].returncode == 0
    jobs[1].communicate(timeout=HANG)
    again = swap_hpc(*job, "--phase", "refine", "--group", "1", ranks=per_group)
    assert again.code == 0 and "group 1 goes on" in again.stdout, again.stderr
    # Jobs of groups leave the metrics of phase 1 alone.
    assert (out / "metrics" / "world.jsonl").read_text() == world
    last = swap_hpc(*job, "--phase", "average")
    assert last.code == 0 and "**averaged (SWAP)**" in last.stdout, last.stderr
    assert kept(out) == kept(tmp_path / "whole") and not (out / "checkpoints").exists()
    files = {path.name for path in out.iterdir()}
    assert {"environment.json", "environment-average.json"} <= files
    environment = json.loads((out / "environment-group-001.json").read_text())
    assert len(environment["ranks"]) == per_group and environment["command"][-1] == "1"
    assert [refine_ranks(tmp_path / "whole"), refine_ranks(out)] == [ranks, None]


def refine_ranks(out: Path) -> int | None:
    return json.loads((out / "result.json").read_text())["refine_ranks"]


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        (
            "--phase refine",
            (),
            "--phase refine needs --group, one of 0 to 3: the group that this job refines",
        ),
        ("--group 1", (), "--group 1 belongs to --phase refine"),
        ("--phase refine --group 4", (), "--group 4: digits has groups 0 to 3"),
        (
            "--phase average",
            ("refine.epochs=0",),
            "--phase average, but refine.epochs = 0: there is nothing to refine and average",
        ),
        (
            "--phase large_batch",
            ("large_batch.epochs=0", "model.weights=some.safetensors"),
            "--phase large_batch, but large_batch.epochs = 0: begin with --phase refine",
        ),
        (
            "--phase large_batch",
            ("refine.evaluate_average=1",),
            "groups that are refined by jobs of their own cannot be averaged on the way: "
            "--set refine.evaluate_average=0 for all of them",
        ),
    ],
)
def test_what_is_no_part_gets_one_line(
    options: str, fields: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    line = ("train", "digits", *options.split(), *settings(*fields))
    done = swap_hpc(*line, "--out", tmp_path / "out")
    assert done.code == 2 and done.ours == [f"swap-hpc: {message}"]
    assert not (tmp_path / "out").exists()


def test_a_part_whose_beginning_is_missing_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = ("train", "digits", *QUICK, "--out", str(out))
    missing = "has not ended, and this job does not train it: first"
    refused = swap_hpc(*job, "--phase", "refine", "--group", "0")
    first = f"swap-hpc: {out}: large_batch {missing} --phase large_batch"
    assert refused.code == 2 and refused.ours == [first]
    assert swap_hpc(*job, "--phase", "large_batch").code == 0
    assert swap_hpc(*job, "--phase", "refine", "--group", "1").code == 0
    refused = swap_hpc(*job, "--phase", "average", ranks=2)
    first = f"swap-hpc: {out}: group-000 {missing} --phase refine --group 0"
    assert refused.code == 2 and refused.ours == [first]
    whole = swap_hpc(*job)  # a job for the whole run does what is missing
    assert whole.code == 0 and "group 1 goes on at its end" in whole.stdout
    assert (out / "result.json").exists()
