"""`evaluate` and `average` as commands: splits, JSON, overrides, weights of other programs."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import Finished, settings, swap_hpc
from PIL import Image
from safetensors.torch import load_file

import swap_hpc as swap_package

FIELDS = settings(
    "groups=2",
    "model.width=2",
    "data.validation=300",
    "large_batch.epochs=2",
    "refine.epochs=1",
    "large_batch.batch_size=256",
    "batchnorm.batch_size=256",
)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluate") / "run"
    done = swap_hpc("train", "digits", *FIELDS, "--out", out, ranks=2, variables=ONE_THREAD)
    assert done.code == 0, done.stderr
    return out


def as_object(done: Finished) -> dict[str, Any]:
    """Return what a command printed, which is one JSON object."""
    assert done.code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_numbers_of_each_split_are_the_runs(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    file = run / "swap.safetensors"
    for split in ("validation", "test"):
        line = ("evaluate", file, "--split", split, "--json")
        found = as_object(swap_hpc(*line, ranks=2, variables=ONE_THREAD))
        assert found.keys() == {
            "file",
            f"{split}_loss",
            f"{split}_accuracy",
            "weights_sha256",
            "notes",
        }
        assert found[f"{split}_accuracy"] == result[f"{split}_accuracy"]["averaged"]
        assert found["weights_sha256"] == result["weights_sha256"]
    line = ("evaluate", file, "--split", "train", "--json")
    metrics = ("--set", 'metrics=["class_accuracy","accuracy"]')
    found = as_object(swap_hpc(*line, *metrics))
    shares = found["train_class_accuracy_by_class"]
    assert len(shares) == 10 and found["train_class_accuracy"] == pytest.approx(np.mean(shares))


def test_averages_name_both_splits_and_their_members(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    found = as_object(swap_hpc("average", run, "--json", variables=ONE_THREAD))
    assert found["groups"] == [0, 1] and found["weights_sha256"] == result["weights_sha256"]
    assert found["test_accuracy"] == result["test_accuracy"]["averaged"]
    done = swap_hpc("average", run, "--greedy", ranks=2)
    assert done.code == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first.startswith(f"{run}/average-greedy.safetensors: validation accuracy ")
    assert "%, validation loss" in first and "test accuracy" in first
    assert second.startswith("groups in it, the best first: ") and "weights_sha256" in third


def test_a_state_dict_of_another_program_is_evaluated_by_a_recipe(
    run: Path, tmp_path: Path
) -> None:
    own = load_file(run / "swap.safetensors")
    other = tmp_path / "other.pth"
    torch.save({"state_dict": {f"module.{k}": t for k, t in own.items()}, "epoch": 3}, other)
    refused = swap_hpc("evaluate", other)
    assert refused.code == 2 and "--recipe RECIPE names the model and the data" in refused.ours[0]
    line = ("--recipe", "digits", "--set", "model.width=2", "--json")
    found = as_object(swap_hpc("evaluate", other, *line))
    result = json.loads((run / "result.json").read_text())
    assert found["test_accuracy"] == pytest.approx(result["test_accuracy"]["averaged"], abs=0.002)
    assert found["weights_sha256"] == result["weights_sha256"]
    assert any("prefix module. removed" in note for note in found["notes"])


def test_the_entry_that_a_message_names_can_be_chosen(run: Path, tmp_path: Path) -> None:
    own, group = (load_file(run / f"{name}.safetensors") for name in ("swap", "group-001"))
    both = tmp_path / "both.pth"
    torch.save({"state_dict": own, "state_dict_ema": group}, both)
    entry = ("--set", "model.weights_entry=state_dict_ema")
    line = ("evaluate", both, "--recipe", "digits", "--set", "model.width=2", *entry, "--json")
    result = json.loads((run / "result.json").read_text())
    found = as_object(swap_hpc(*line))
    assert found["test_accuracy"] == pytest.approx(result["test_accuracy"]["groups"][1], abs=0.002)


def test_what_a_recipe_begins_with_is_not_about_the_file_that_it_describes(
    run: Path, tmp_path: Path
) -> None:
    own, recipe = run / "swap.safetensors", tmp_path / "finetune.toml"
    digits = Path(swap_package.__file__).parent / "recipe" / "digits.toml"
    begins = '[model]\nweights = "gone.pth"\nweights_entry = "ema"\nweights_except = ["linear.*"]\n'
    recipe.write_text(digits.read_text().replace("[model]\n", begins))
    assert begins in recipe.read_text()
    refines = settings("model.width=2", "large_batch.epochs=0")
    line: list[str | Path] = ["evaluate", own, "--recipe", recipe, *refines, "--json"]
    result = json.loads((run / "result.json").read_text())
    assert as_object(swap_hpc(*line))["weights_sha256"] == result["weights_sha256"]
    except_for = ("--set", "model.weights_except=linear.*")
    found = as_object(swap_hpc(*line, *except_for))
    assert found["weights_sha256"] != result["weights_sha256"]
    assert "linear.weight" in found["notes"][0] and "left as initialised" in found["notes"][0]


def test_samples_that_a_run_trained_on_are_told_from_its_validation_samples(run: Path) -> None:
    file = run / "swap.safetensors"
    line = ("evaluate", file, "--split", "validation", "--set", "data.validation=100", "--json")
    (note,) = as_object(swap_hpc(*line))["notes"]
    assert note == (
        "note: not the validation samples of the run (300 validation samples then, 100 now)"
    )
    line = ("evaluate", file, "--split", "validation", "--set", "data.validation=400", "--json")
    (note,) = as_object(swap_hpc(*line))["notes"]
    assert note == (
        "note: not the validation samples of the run (300 validation samples then, 400 now): "
        "it was trained on 100 of them"
    )
    refused = swap_hpc("evaluate", file, "--split", "validation", "--set", "data.validation=")
    assert refused.code == 2 and refused.ours == [
        "swap-hpc: --split validation: the data have no validation split, the run had one: "
        "--set data.validation=300 sets the same samples aside"
    ]
    # what a run needs a validation split for, an evaluation does not
    others = ("--set", "data.validation=", "--set", "checkpoint.best=true")
    (note,) = as_object(swap_hpc("evaluate", file, "--split", "train", *others, "--json"))["notes"]
    assert note.startswith("note: not the training samples of the run (898 training samples then")


def test_predictions_that_cannot_be_written_are_one_line(run: Path) -> None:
    done = swap_hpc(
        "evaluate", run / "swap.safetensors", "--predictions", "/proc/table.csv", ranks=2
    )
    assert done.code == 3
    assert done.ours == ["swap-hpc: cannot write /proc/table.csv: No such file or directory"]


def test_predictions_of_a_folder_have_the_paths(run: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in range(10):
            folder = tmp_path / split / str(label)
            folder.mkdir(parents=True)
            for i in range(30 if split == "train" else 2):
                noise = np.random.default_rng(i).integers(0, 255, (8, 8, 3), np.uint8)
                Image.fromarray(noise).save(folder / f"{i}.png")
    small = settings(
        "data.name=folder",
        "data.image_size=8",
        "groups=1",
        "model.width=2",
        "large_batch={batch_size=100,epochs=1,learning_rate=0.01}",
        "refine.epochs=0",
        "evaluate.batch_size=3",
        "augment={}",
    )
    out, table = tmp_path / "run", tmp_path / "table.csv"
    done = swap_hpc("train", "digits", *small, "--data", tmp_path, "--out", out)
    assert done.code == 0, done.stderr
    line = ("evaluate", out / "large_batch.safetensors", "--predictions", table, "--json")
    found = as_object(swap_hpc(*line, ranks=2))
    with open(table, encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    names = [f"{tmp_path}/test/{label}/{i}.png" for label in range(10) for i in range(2)]
    assert [row["name"] for row in rows] == names
    right = [
        max(range(10), key=lambda i: float(row[f"output_{i}"])) == int(row["target"])
        for row in rows
    ]
    assert found["test_accuracy"] == pytest.approx(np.mean(right))
