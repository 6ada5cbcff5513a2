"""The worked examples, started as their first lines say."""

import json
import sys
from pathlib import Path

from launch import command, swap_hpc

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_model_data_loss_and_metric_of_ones_own(tmp_path: Path) -> None:
    done = swap_hpc("train", "discs.toml", "--out", tmp_path / "run", ranks=2, cwd=EXAMPLES)
    assert done.code == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    overlap = result["test_accuracy"]
    assert (
        0.85 < overlap["averaged"] < 1 and overlap["averaged"] > overlap["mean_of_groups"] - 0.005
    )
    evaluated = swap_hpc("evaluate", tmp_path / "run" / "swap.safetensors", cwd=EXAMPLES)
    assert f"test accuracy {100 * overlap['averaged']:.2f} %" in evaluated.stdout, evaluated.stderr


def test_a_run_on_own_data_gives_the_same_on_one_rank(tmp_path: Path) -> None:
    digests = set()
    for ranks in (1, 2):
        fields = [
            "--set",
            "large_batch.epochs=0",
            "--set",
            f"model.weights={tmp_path / 'start.safetensors'}",
        ]
        if ranks == 1:
            first = swap_hpc(
                "train",
                "discs.toml",
                "--out",
                tmp_path / "start",
                "--set",
                "refine.epochs=0",
                cwd=EXAMPLES,
            )
            assert first.code == 0, first.stderr
            (tmp_path / "start" / "large_batch.safetensors").rename(tmp_path / "start.safetensors")
        done = swap_hpc(
            "train",
            "discs.toml",
            "--out",
            tmp_path / str(ranks),
            *fields,
            ranks=ranks,
            cwd=EXAMPLES,
        )
        assert done.code == 0, done.stderr
        result = json.loads((tmp_path / str(ranks) / "result.json").read_text())
        digests.add(tuple(result["test_accuracy"]["groups"]))
    assert len(digests) == 1


def test_the_loop_with_swap_ends_alike_on_all_ranks_and_better_than_without() -> None:
    plain = command(sys.executable, "plain_loop.py", cwd=EXAMPLES)
    done = command(sys.executable, "-m", "mpi4py", "swap_loop.py", ranks=2, cwd=EXAMPLES)
    assert plain.code == done.code == 0, plain.stderr + done.stderr
    first, second = done.stdout.splitlines()
    assert first == second and float(first.split()[1]) > float(plain.stdout.split()[1])
