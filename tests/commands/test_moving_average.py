"""A run with moving averages: its files, lines, result and report."""

import json
from pathlib import Path

import pytest
import torch
from launch import settings, swap_hpc
from safetensors.torch import load_file

QUICK = settings(
    "groups=2",
    "model.width=4",
    "large_batch.epochs=2",
    "large_batch.learning_rate=0.05",
    "refine.epochs=1",
    "refine.learning_rate=0.01",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One run with averages, and the same without."""
    folder = tmp_path_factory.mktemp("runs")
    averaged = settings("large_batch.ema=0.8", "refine.ema=0.9")
    for name, more in (("with", averaged), ("without", ())):
        done = swap_hpc("train", "digits", "--out", folder / name, *QUICK, *more, ranks=1)
        assert done.code == 0, done.stderr
    return folder / "with", folder / "without"


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def test_the_result_holds_it_beside_the_models(runs: tuple[Path, Path]) -> None:
    averaged, plain = map(result, runs)
    assert averaged["weights_sha256"] == plain["weights_sha256"]
    for name in ("test_accuracy", "test_loss"):
        figures = dict(averaged[name])
        lines = (runs[0] / "metrics" / "world.jsonl").read_text().splitlines()
        ends = [json.loads(line) for line in lines if "large_batch" in json.loads(line)["phase"]]
        assert figures.pop("large_batch_ema") == ends[-1][f"ema_{name}"]
        assert len(figures.pop("groups_ema")) == 2
        assert figures == plain[name]


def test_its_files_are_the_models_that_were_evaluated(runs: tuple[Path, Path]) -> None:
    accuracies = result(runs[0])["test_accuracy"]
    assert {path.name for path in runs[0].glob("*-ema*")} == {
        "large_batch-ema.safetensors",
        "group-000-ema.safetensors",
        "group-001-ema.safetensors",
    }
    assert not [*runs[1].glob("*-ema*")]
    for name, accuracy in (
        ("large_batch", accuracies["large_batch_ema"]),
        ("group-001", accuracies["groups_ema"][1]),
    ):
        done = swap_hpc("evaluate", runs[0] / f"{name}-ema.safetensors")
        assert done.code == 0, done.stderr
        assert f"test accuracy {100 * accuracy:.2f} %" in done.stdout


def test_a_run_that_begins_with_anothers_phase_1_has_its_average(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    averaged = settings("large_batch.ema=0.8", "refine.epochs=0")
    out = tmp_path / "run"
    done = swap_hpc("train", "digits", "--from", runs[0], "--out", out, *QUICK, *averaged)
    assert done.code == 0, done.stderr
    found, before = result(out)["test_accuracy"], result(runs[0])["test_accuracy"]
    assert found["large_batch_ema"] == before["large_batch_ema"]
    files = [run / "large_batch-ema.safetensors" for run in (out, runs[0])]
    one, other = map(load_file, files)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_report_has_a_row_for_each(runs: tuple[Path, Path]) -> None:
    done = swap_hpc("report", runs[0])
    assert done.code == 0, done.stderr
    text = (runs[0] / "report.md").read_text()
    accuracies = result(runs[0])["test_accuracy"]
    for model, accuracy in (
        ("end of phase 1, moving average (EMA)", accuracies["large_batch_ema"]),
        ("group 1, moving average (EMA)", accuracies["groups_ema"][1]),
    ):
        (row,) = [line for line in text.splitlines() if f"| {model}" in line]
        assert f" {100 * accuracy:.2f} " in row
