"""`average` and `evaluate`: new results from saved weights, without training."""

import json
import shutil
from pathlib import Path

import pytest
from launch import Finished, swap_hpc

FIELDS = ("large_batch.epochs=2", "refine.epochs=1", "refine.cycles=2", "model.width=4")
QUICK = [part for field in FIELDS for part in ("--set", field)]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 groups and 2 cycles on 2 ranks, its averaged model evaluated after every epoch."""
    out = tmp_path_factory.mktemp("runs") / "run"
    fields = (*QUICK, "--set", "refine.evaluate_average=1")
    done = swap_hpc("train", "digits", *fields, "--out", out, ranks=2, variables=ONE_THREAD)
    assert done.code == 0, done.stderr
    return out


def printed(done: Finished) -> tuple[str, float, str]:
    """Return the file, the accuracy in percent and the hash that a command printed."""
    assert done.code == 0, done.stderr
    first, second = done.stdout.splitlines()
    return first.split(":")[0], float(first.split()[3]), second.split()[1]


@pytest.mark.parametrize("ranks", [None, 2, 3])
def test_the_average_of_all_groups_is_the_runs_to_the_bit(run: Path, ranks: int | None) -> None:
    result = json.loads((run / "result.json").read_text())
    file, accuracy, digest = printed(swap_hpc("average", run, ranks=ranks, variables=ONE_THREAD))
    assert file == str(run / "average.safetensors") and digest == result["weights_sha256"]
    assert accuracy == round(100 * result["test_accuracy"]["averaged"], 2)


def test_a_lost_group_is_left_out(run: Path, tmp_path: Path) -> None:
    """The run itself never ended."""
    lost = tmp_path / "lost"
    shutil.copytree(run, lost)
    for name in (
        "group-001.safetensors",
        "group-001-cycles.safetensors",
        "result.json",
        "swap.safetensors",
    ):
        (lost / name).unlink()
    refused = swap_hpc("average", lost)
    message = (
        "no weights of group 1, whose refinement has not ended: "
        "--groups 0,2,3 averages those that have"
    )
    assert refused.code == 2 and refused.ours == [f"swap-hpc: {lost}: {message}"]
    file, accuracy, digest = printed(swap_hpc("average", lost, "--groups", "0,2,3"))
    assert file == str(lost / "average-0-2-3.safetensors") and accuracy > 50
    assert printed(swap_hpc("evaluate", file)) == (file, accuracy, digest)
    assert digest != json.loads((run / "result.json").read_text())["weights_sha256"]


def test_an_unknown_group_or_run_is_refused(run: Path, tmp_path: Path) -> None:
    for arguments, message in {
        (run, "--groups", "0,4"): "--groups 0,4: the run has groups 0 to 3",
        (run, "--groups", "one"): "--groups one: write the numbers as 0,2,3",
        (tmp_path,): f"{tmp_path} is not a run's folder: there is no recipe.toml in it",
    }.items():
        done = swap_hpc("average", *arguments)
        assert done.code == 2 and done.ours == [f"swap-hpc: {message}"]


def test_every_model_is_evaluated_as_the_run_did(run: Path) -> None:
    accuracies = json.loads((run / "result.json").read_text())["test_accuracy"]
    expected = {
        "swap": accuracies["averaged"],
        "large_batch": accuracies["large_batch"],
        "group-003": accuracies["groups"][-1],
    }
    for name, accuracy in expected.items():
        _, percent, _ = printed(swap_hpc("evaluate", run / f"{name}.safetensors"))
        assert percent == round(100 * accuracy, 2)
    # the average over one group's cycles, which the run itself does not evaluate
    cycles = swap_hpc("evaluate", run / "group-000-cycles.safetensors", ranks=2)
    assert printed(cycles)[1] > 50


def test_a_file_that_cannot_be_evaluated_is_refused(run: Path, tmp_path: Path) -> None:
    done = swap_hpc("evaluate", run)
    message = f"swap-hpc: cannot read the weights {run}: a folder: name a .safetensors file in it"
    assert done.code == 2 and done.ours == [message]
    half = tmp_path / "half.safetensors"
    half.write_bytes((run / "swap.safetensors").read_bytes()[:5000])
    done = swap_hpc("evaluate", half, ranks=2)
    assert done.code == 2 and len(done.ours) == 1
    assert done.ours[0].startswith(f"swap-hpc: cannot read the weights {half}: ")


def test_the_averaged_models_curve_stands_beside_the_groups(run: Path) -> None:
    text = (run / "metrics" / "world.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    averages = [line for line in lines if line.get("model") == "average"]
    assert [line["epoch"] for line in averages] == [1] and 0.3 < averages[0]["test_accuracy"] <= 1
    assert lines[-1]["model"] == "swap"
