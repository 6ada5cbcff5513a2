"""The worked examples, started as their first lines say."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import Finished, command, settings, swap_hpc
from safetensors.torch import load_file

from swap_hpc.average.agreement import hashed

EXAMPLES = Path(__file__).parents[1] / "examples"


def train_discs(out: Path, *fields: str, ranks: int | None = None) -> Finished:
    options = [word for field in fields for word in ("--set", field)]
    done = swap_hpc("train", "discs.toml", "--out", out, *options, ranks=ranks, cwd=EXAMPLES)
    assert done.code == 0, done.stderr
    return done


def result_of(out: Path) -> Any:
    return json.loads((out / "result.json").read_text())


def test_a_model_data_loss_and_metric_of_ones_own(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_discs(out, ranks=2)
    overlap = result_of(out)["test_overlap"]
    assert 0.85 < overlap["averaged"] < 1
    assert overlap["averaged"] > overlap["mean_of_groups"] - 0.005
    evaluated = swap_hpc("evaluate", out / "swap.safetensors", cwd=EXAMPLES)
    expected = f"test overlap {overlap['averaged']:.6g}, "
    assert expected in evaluated.stdout, evaluated.stderr


def test_a_run_on_own_data_gives_the_same_on_one_rank(tmp_path: Path) -> None:
    """Phase 1 is left out: batch norm would see another share of its batches."""
    seldom = ("checkpoint.epochs=0", "checkpoint.min_seconds=5")
    done = train_discs(tmp_path / "start", "refine.epochs=0", *seldom)
    assert "checkpoint.min_seconds has no effect: checkpoint.epochs = 0 asks" in done.stdout
    weights = tmp_path / "start" / "large_batch.safetensors"
    accuracies = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        train_discs(out, "large_batch.epochs=0", f"model.weights={weights}", ranks=ranks)
        accuracies.append(result_of(out)["test_overlap"]["groups"])
    assert accuracies[0] == accuracies[1]


def test_the_loop_with_swap_ends_alike_on_all_ranks_and_better_than_without() -> None:
    plain = command(sys.executable, "plain_loop.py", cwd=EXAMPLES)
    line = (sys.executable, "-m", "mpi4py", "tests/examples/swap_loop.py")
    done = command(*line, ranks=2, cwd=EXAMPLES.parents[1])
    assert plain.code == done.code == 0, plain.stderr + done.stderr
    first, second = done.stdout.splitlines()
    assert first == second and float(first.split()[1]) > float(plain.stdout.split()[1])


# A torch Dataset of one's own, text in dictionaries, a table, a transformer with AdamW and groups.
EXAMPLE_RECIPES = ("shifted_digits", "sums", "table", "vit")


@pytest.mark.parametrize("name", EXAMPLE_RECIPES)
def test_examples_are_the_same_on_two_ranks_and_after_a_kill(name: str, tmp_path: Path) -> None:
    """One rank trains all; then two ranks go on from its phase 1, and one of them is killed."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = swap_hpc("train", f"{name}.toml", "--out", whole, cwd=EXAMPLES)
    assert done.code == 0, done.stderr
    fault = {"kind": "kill", "place": "refine", "rank": 1, "mark": str(tmp_path / "mark")}
    faulty = json.dumps(fault | {"step": "epoch 2, step 3"})
    train: list[str | Path] = ["train", f"{name}.toml", "--out", parts, "--from", whole]
    train += settings("checkpoint.min_seconds=0")
    program = (sys.executable, EXAMPLES.parent / "faults.py", faulty)
    killed = command(*program, *train, ranks=2, cwd=EXAMPLES)
    assert killed.code and (tmp_path / "mark").exists(), killed.stderr
    assert [*(parts / "checkpoints").glob("group-*")]
    resumed = swap_hpc(*train, ranks=2, cwd=EXAMPLES)
    assert resumed.code == 0, resumed.stderr
    for part in ("group-000", "group-001"):
        one, other = (load_file(out / f"{part}.safetensors") for out in (whole, parts))
        assert hashed(one).hexdigest() == hashed(other).hexdigest()
    if name != "shifted_digits":  # its batch norm sums over ranks, in float64, in another order
        assert result_of(whole)["weights_sha256"] == result_of(parts)["weights_sha256"]
