"""`landscape` and `trajectory` of a real run: the numbers of the figures against the run's own."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from launch import swap_hpc
from safetensors.torch import load_file

FIELDS = ("large_batch.epochs=3", "refine.epochs=2", "groups=4", "checkpoint.snapshots=1")
QUICK = [part for field in FIELDS for part in ("--set", field)]

TEST_IMAGES = 599  # of digits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("figures") / "run"
    done = swap_hpc("train", "digits", *QUICK, "--out", out, ranks=2)
    assert done.code == 0, done.stderr
    return out


def test_a_landscape_shows_the_runs_own_models_on_any_number_of_ranks(run: Path) -> None:
    surfaces = []
    for ranks in (1, 3):
        done = swap_hpc("landscape", run, "--points", "4", "--samples", "2000", ranks=ranks)
        assert done.code == 0 and "landscape.png" in done.stdout, done.stderr
        surfaces.append(json.loads((run / "landscape.json").read_text()))
    assert surfaces[0] == surfaces[1]
    assert (run / "landscape.png").read_bytes().startswith(b"\x89PNG")
    first, groups = surfaces[0]["planes"]
    accuracy = json.loads((run / "result.json").read_text())["test_accuracy"]
    errors = {model["name"]: model["test_error"] for model in first["models"]}
    # batch norm is refreshed as after averaging, hence to the digit
    assert errors["swap"] == pytest.approx(1 - accuracy["averaged"], abs=1e-9)
    # the group's own statistics were a running mean, hence about the same
    assert errors["group-000"] == pytest.approx(1 - accuracy["groups"][0], abs=0.05)
    assert [model["in_plane"] for model in groups["models"]] == [True, True, True, False]
    for plane in (first, groups):
        assert np.shape(plane["test_error"]) == np.shape(plane["train_error"]) == (4, 4)
        assert len(plane["x"]) == len(plane["y"]) == 4
        wrong = TEST_IMAGES * np.ravel(plane["test_error"])
        assert wrong == pytest.approx(wrong.round(), abs=1e-6)
        assert len(np.unique(wrong.round())) > 4
        models = [model["x"] for model in plane["models"]]
        assert plane["x"][0] < min(models) < max(models) < plane["x"][-1]


def apart(one: Path, other: Path) -> float:
    """Return the distance between the parameters of two models."""
    mine, its = (load_file(file.with_suffix(".safetensors")) for file in (one, other))
    squares = [
        (mine[name].double() - its[name].double()).square().sum()
        for name in mine
        if "running" not in name and "num_" not in name
    ]
    return float(sum(squares) ** 0.5)


def test_a_trajectory_points_to_the_average_and_report_draws_it_again(run: Path) -> None:
    paths = []
    for ranks in (1, 3):
        done = swap_hpc("trajectory", run, "--samples", "500", ranks=ranks)
        assert done.code == 0, done.stderr
        paths.append(json.loads((run / "trajectory.json").read_text()))
    assert paths[0] == paths[1]
    found = {(each["part"], each["epoch"]): each for each in paths[0]["snapshots"]}
    assert len(found) == 3 + 4 * 2 and all(-1 <= each["cosine"] <= 1 for each in found.values())
    assert found["large_batch", 1]["cosine"] > 0.05  # far off, downhill is towards the average
    assert found["large_batch", 1]["distance"] > found["large_batch", 3]["distance"] > 0
    snapshots = run / "snapshots"
    expected = apart(snapshots / "large_batch-00001", run / "swap")
    assert found["large_batch", 1]["distance"] == pytest.approx(expected, rel=1e-6)
    pairs = paths[0]["between_groups"]
    assert len(pairs) == 2 * 6 and all(each["distance"] > 0 for each in pairs)
    for each in pairs:
        one, other = (snapshots / f"{group}-{each['epoch']:05d}" for group in each["groups"])
        assert each["distance"] == pytest.approx(apart(one, other), rel=1e-6)
    (run / "trajectory.png").unlink()
    assert swap_hpc("report", run).code == 0
    assert (run / "trajectory.png").is_file()
    assert "![trajectory](trajectory.png)" in (run / "report.md").read_text()


NEEDED = {
    "landscape": "no swap.safetensors in it: a landscape needs a complete run with a refinement",
    "trajectory": "has no snapshots: train with --set checkpoint.snapshots=1 (epochs between them)",
}


def test_a_run_that_cannot_be_drawn_is_refused(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("snapshots", "swap.safetensors"))
    for command, message in NEEDED.items():
        done = swap_hpc(command, bare, ranks=2)
        assert done.code == 2 and len(done.ours) == 1 and message in done.ours[0], done.stderr
