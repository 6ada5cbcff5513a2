"""A run with three splits: epochs by validation, ends by both, and every number named."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from launch import settings, swap_hpc

FIELDS = settings(
    "groups=2",
    "model.width=2",
    "data.validation=300",
    "large_batch.epochs=2",
    "refine.epochs=2",
    "refine.evaluate_average=1",
    "large_batch.batch_size=256",
    "batchnorm.batch_size=256",
    "tensorboard=true",
)


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a run on digits with 300 samples set aside."""
    out = tmp_path_factory.mktemp("three") / "run"
    done = swap_hpc("train", "digits", *FIELDS, "--out", out, ranks=2)
    assert done.code == 0, done.stderr
    return out, done.stdout


def lines(out: Path, name: str) -> list[dict[str, Any]]:
    text = (out / "metrics" / f"{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_epochs_are_evaluated_by_validation_and_ends_by_both(three: tuple[Path, str]) -> None:
    out, said = three
    assert "898 training, 300 validation and 599 test images" in said
    samples = json.loads((out / "environment.json").read_text())["data"]["samples"]
    assert samples == {"train": 898, "validation": 300, "test": 599}
    for name, phase in (("world", "large_batch"), ("group-001", "refine")):
        epochs = [line for line in lines(out, name) if line["phase"] == phase]
        assert [line["validation_accuracy"] is None for line in epochs] == [False, False]
        assert [line["test_accuracy"] is None for line in epochs] == [True, False]
    evaluations = {line["model"]: line for line in lines(out, "world") if "model" in line}
    assert "test_accuracy" not in evaluations["average"]
    assert 0 <= evaluations["average"]["validation_accuracy"] <= 1
    result = json.loads((out / "result.json").read_text())
    for split in ("validation", "test"):
        found = result[f"{split}_accuracy"]
        assert found["averaged"] == evaluations["swap"][f"{split}_accuracy"]
        assert found["large_batch"] == evaluations["large_batch"][f"{split}_accuracy"]
        assert len(found["groups"]) == 2
    # multiples of one sample of each split
    whole = {"validation": 300, "test": 599}
    for split, number in whole.items():
        right = result[f"{split}_accuracy"]["averaged"] * number
        assert right == pytest.approx(round(right), abs=1e-6)


def test_every_number_is_named_as_what_it_is(three: tuple[Path, str]) -> None:
    out, said = three
    first, second = re.findall(r"large_batch  epoch.*", said)
    assert "validation accuracy 0." in first and "test" not in first
    assert "validation accuracy 0." in second and "test accuracy 0." in second
    assert re.search(r"average +epoch +1  validation accuracy 0", said)
    result = json.loads((out / "result.json").read_text())
    done = swap_hpc("report", out)
    assert done.code == 0, done.stderr
    (head,) = [line for line in done.stdout.splitlines() if line.startswith("| model")]
    names = [cell.strip() for cell in head.strip("|").split("|")]
    assert names == [
        "model",
        "validation accuracy %",
        "validation loss",
        "test accuracy %",
        "test loss",
    ]
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("| **averaged")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == f"{100 * result['validation_accuracy']['averaged']:.2f}"
    assert cells[3] == f"{100 * result['test_accuracy']['averaged']:.2f}"


def test_a_run_on_its_way_has_both_splits_too(three: tuple[Path, str]) -> None:
    from swap_hpc.run.folder import load_run

    out, _ = three
    (out / "result.json").rename(out / "kept.json")
    try:
        partly = load_run(out)
    finally:
        (out / "kept.json").rename(out / "result.json")
    whole = load_run(out)
    for key in ("validation_accuracy", "validation_loss", "test_accuracy", "test_loss"):
        assert partly[key] == whole[key]
