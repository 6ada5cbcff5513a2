"""A regression: nothing that a person or a program reads calls its error an accuracy."""

import json
from pathlib import Path

import pytest
from launch import Finished, settings, swap_hpc

CODE = """
from functools import partial
import torch
from torch import nn
from swap_hpc import Batches, Dataset

def load(path):
    def made(samples, seed):
        inputs = torch.randn(samples, 4, generator=torch.Generator().manual_seed(seed))
        return inputs, 100 * inputs.sum(1)

    def batches(inputs, targets, picks, training):
        for pick in picks:
            yield inputs[pick.indices], targets[pick.indices]

    parts = {"train": made(96, 0), "test": made(40, 1)}
    splits = {name: Batches(len(y), partial(batches, x, y)) for name, (x, y) in parts.items()}
    return Dataset(**splits, classes=("sum",))

def build(classes, channels):
    return nn.Linear(4, 1)

def loss(outputs, targets):
    return ((outputs[:, 0] - targets) / 100).square().mean()

def negative_error(outputs, targets):
    return -(outputs[:, 0] - targets).abs()

def error(outputs, targets):
    return (outputs[:, 0] - targets).abs()
"""

RECIPE = """
groups = 2
loss = "sums:loss"
metrics = ["sums:negative_error", { name = "sums:error", smaller_is_better = true }]
tensorboard = true
model.name = "sums:build"
data.name = "sums:load"
large_batch = { batch_size = 24, epochs = 2, learning_rate = 0.05 }
refine = { batch_size = 12, epochs = 2, learning_rate = 0.02, evaluate_average = 1 }
optimizer.weight_decay = 0.0
"""

# What is said of accuracies or of images, or in percent.
WRONG = ("accurac", "image", "%")


@pytest.fixture(scope="session")
def regression(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("regression")
    (folder / "sums.py").write_text(CODE)
    (folder / "sums.toml").write_text(RECIPE)
    done = swap_hpc("train", "sums.toml", "--out", "run", ranks=2, cwd=folder)
    assert done.code == 0, done.stderr
    assert "96 training and 40 test samples, made by sums:load" in done.stdout
    assert "train negative_error -" in done.stdout and "samples/s" in done.stdout
    check_words(done.stdout)
    return folder


def check_words(text: str) -> None:
    found = [line for line in text.splitlines() for word in WRONG if word in line.lower()]
    assert not found, found


def run(folder: Path, *arguments: str) -> Finished:
    done = swap_hpc(*arguments, cwd=folder)
    assert done.code == 0, done.stderr
    return done


def test_files_call_each_metric_by_its_name(regression: Path) -> None:
    result = json.loads((regression / "run" / "result.json").read_text())
    assert not [key for key in result if "accuracy" in key]
    better, error = result["test_negative_error"], result["test_error"]
    assert better["averaged"] == pytest.approx(-error["averaged"]) and error["averaged"] > 1
    assert result["train_error"]["large_batch"] > 0
    lines = (regression / "run" / "metrics" / "group-000.jsonl").read_text().splitlines()
    keys = {"train_error", "test_error", "train_negative_error", "test_negative_error"}
    assert all(keys <= json.loads(line).keys() for line in lines)
    assert "accuracy" not in lines[0]


def test_tables_lines_and_figures_call_each_metric_by_its_name(regression: Path) -> None:
    value = json.loads((regression / "run" / "result.json").read_text())["test_error"]["averaged"]
    evaluated = run(regression, "evaluate", "run/swap.safetensors").stdout
    assert f"test error {value:.6g}, test loss" in evaluated
    check_words(evaluated)
    report = run(regression, "report", "run").stdout
    assert "| test negative_error" in report and f"{value:.6g}" in report
    check_words(report)
    written = (regression / "run" / "report.md").read_text()
    assert "![negative_error and learning rate](curves.png)" in written
    run(regression, "landscape", "run", "--points", "3", "--samples", "20")
    plane = json.loads((regression / "run" / "landscape.json").read_text())["planes"][0]
    swap = next(model for model in plane["models"] if model["name"] == "swap")
    assert swap["test_loss"] > 0 and "test_error" not in swap


def test_an_error_is_not_stopped_at_from_below(regression: Path) -> None:
    line = settings('metrics=[{name="sums:error",smaller_is_better=true}]')
    line += settings("large_batch.stop_accuracy=0.5")
    done = swap_hpc("train", "sums.toml", "--out", "stop", *line, cwd=regression)
    assert done.code == 2 and "smaller values of error are better" in done.ours[0]
