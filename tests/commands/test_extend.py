"""`train --extend` on several ranks, killed on its way, and its messages."""

import json
import sys
from pathlib import Path

from launch import command, settings, swap_hpc

FIELDS = settings(
    "groups=2",
    "model.width=4",
    "large_batch.epochs=1",
    "refine.learning_rate=0.05",
    "checkpoint.keep=true",
    "checkpoint.min_seconds=0",
)


def weights(out: Path) -> str:
    digest: str = json.loads((out / "result.json").read_text())["weights_sha256"]
    return digest


def test_an_extension_that_is_killed_ends_like_a_run_that_was_longer_at_once(
    tmp_path: Path,
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    short, long = settings("refine.epochs=1"), settings("refine.epochs=3")
    for folder, fields in ((whole, long), (out, short)):
        done = swap_hpc("train", "digits", *FIELDS, *fields, "--out", folder, ranks=2)
        assert done.code == 0, done.stderr
    line = ["train", "digits", *FIELDS, *short, "--out", str(out), "--extend", "refine.epochs=3"]
    fault = {"kind": "kill", "place": "refine", "rank": 1, "mark": str(tmp_path / "mark")}
    faulty = json.dumps(fault | {"step": "epoch 3, step 2"})
    program = (sys.executable, Path(__file__).parents[1] / "faults.py", faulty)
    killed = command(*program, *line, ranks=2)
    assert killed.code and (tmp_path / "mark").exists(), killed.stderr
    assert not (out / "result.json").exists()
    extended = swap_hpc(*line, ranks=2)
    assert extended.code == 0, extended.stderr
    assert weights(out) == weights(whole)
    assert (out / "result-before.json").exists() and (out / "swap-before.safetensors").exists()
    again = swap_hpc(*line, "--extend", "refine.batch_size=16", ranks=2)
    allowed = "refine.epochs, refine.cycles, refine.learning_rate"
    assert again.code == 2 and again.ours == [
        f"swap-hpc: --extend refine.batch_size: this run is extended by {allowed} only; "
        "the refinement would have to begin again"
    ]
