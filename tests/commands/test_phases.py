"""A run done by several jobs, each of which does one part of it: `train --phase`."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from launch import BIN, launch, swap_hpc

QUICK = ("--set", "large_batch.epochs=2", "--set", "refine.epochs=2", "--set", "model.width=4")


def same(out: Path) -> dict[str, Any]:
    """All of a result that does not tell of times, memory and jobs."""
    result = json.loads((out / "result.json").read_text())
    others = ("seconds", "images_per_second", "peak_memory_mib", "refine_ranks")
    return {name: value for name, value in result.items() if name not in others}


@pytest.mark.parametrize("per_group", [1, 2])
def test_a_job_for_each_part_gives_what_one_job_gives(per_group: int, tmp_path: Path) -> None:
    """To the bit; the groups' jobs run at the same time, and one of them is stopped and started again."""
    quick = (*QUICK, "--set", "groups=2")
    ranks = 2 * per_group
    whole = swap_hpc("train", "digits", *quick, "--out", tmp_path / "whole", ranks=ranks)
    assert whole.code == 0, whole.stderr

    out = tmp_path / "parts"
    job = ("train", "digits", *quick, "--out", out)
    first = swap_hpc(*job, "--phase", "large_batch", ranks=ranks)
    assert first.code == 0 and f"large_batch is done, for the run in {out}" in first.stdout, (
        first.stderr
    )
    world = (out / "metrics" / "world.jsonl").read_text()
    jobs = [
        launch(BIN / "swap-hpc", *job, "--phase", "refine", "--group", str(g), ranks=per_group)
        for g in range(2)
    ]
    deadline = time.monotonic() + 60
    while not list(out.glob("checkpoints/group-001-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(jobs[1].pid, signal.SIGKILL)
    assert "group-000 is done" in jobs[0].communicate(timeout=60)[0] and jobs[0].returncode == 0
    jobs[1].communicate(timeout=60)
    again = swap_hpc(*job, "--phase", "refine", "--group", "1", ranks=per_group)
    assert again.code == 0 and "group 1 goes on" in again.stdout, again.stderr
    assert (out / "metrics" / "world.jsonl").read_text() == world  # it is phase 1's
    last = swap_hpc(*job, "--phase", "average")
    assert last.code == 0 and "**averaged (SWAP)**" in last.stdout, last.stderr
    assert same(out) == same(tmp_path / "whole") and not (out / "checkpoints").exists()
    assert not {"environment.json", "environment-average.json"} - {p.name for p in out.iterdir()}
    told = json.loads((out / "environment-group-001.json").read_text())
    ended = [
        json.loads((run / "result.json").read_text())["refine_ranks"]
        for run in (tmp_path / "whole", out)
    ]
    assert ended == [ranks, None]
    assert len(told["ranks"]) == per_group and told["command"][-1] == "1"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--phase", "refine"), "--phase refine needs --group, one of 0 to 3: the group that this job refines"),
        (("--group", "1"), "--group 1 belongs to --phase refine"),
        (("--phase", "refine", "--group", "4"), "--group 4: digits has groups 0 to 3"),
        (("--phase", "average", "--set", "refine.epochs=0"),
         "--phase average, but refine.epochs = 0: there is nothing to refine and average"),
        (("--phase", "large_batch", "--set", "large_batch.epochs=0", "--set", "model.weights=some.safetensors"),
         "--phase large_batch, but large_batch.epochs = 0: begin with --phase refine"),
        (("--phase", "large_batch", "--set", "refine.evaluate_average=1"),
         "groups that are refined by jobs of their own cannot be averaged on the way: --set refine.evaluate_average=0 for all of them"),
    ],
)  # fmt: skip
def test_what_is_no_part_gets_one_line(
    arguments: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    done = swap_hpc("train", "digits", *arguments, "--out", tmp_path / "out")
    assert done.code == 2 and done.ours == [f"swap-hpc: {says}"]
    assert not (tmp_path / "out").exists()


def test_a_part_whose_beginning_is_missing_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused = swap_hpc("train", "digits", *QUICK, "--out", out, "--phase", "refine", "--group", "0")
    says = "has not ended, and this job does not train it: first"
    assert refused.code == 2 and refused.ours == [
        f"swap-hpc: {out}: large_batch {says} --phase large_batch"
    ]
    assert swap_hpc("train", "digits", *QUICK, "--out", out, "--phase", "large_batch").code == 0
    assert (
        swap_hpc("train", "digits", *QUICK, "--out", out, "--phase", "refine", "--group", "1").code
        == 0
    )
    refused = swap_hpc("train", "digits", *QUICK, "--out", out, "--phase", "average", ranks=2)
    assert refused.code == 2 and refused.ours == [
        f"swap-hpc: {out}: group-000 {says} --phase refine --group 0"
    ]
    whole = swap_hpc(
        "train", "digits", *QUICK, "--out", out
    )  # a job for all of it does what is missing
    assert (
        whole.code == 0
        and "group 1 goes on at its end" in whole.stdout
        and (out / "result.json").exists()
    )
