"""What a tracker sends: each point once, also after a restart; a service that fails ends no run."""

import json
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
from rich.console import Console

from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1, Part, Phase, refinement_of
from swap_hpc.run import record
from swap_hpc.run import tracker as trackers
from swap_hpc.run.lines import Line
from swap_hpc.run.run import train
from swap_hpc.run.tracker import Tracker, check_tracker, tracker_of
from swap_hpc.train.control import Control

RECIPE = tiny.recipe(tracker="mlflow")
EPOCHS: list[Line] = [
    {"phase": "large_batch", "epoch": epoch, "train_loss": 1 / epoch, "test_loss": None}
    for epoch in (1, 2, 3)
]
END: Line = {"phase": "evaluation", "model": "swap", "test_accuracy": 0.5}


@dataclass
class Sent:
    """A service in memory: what it was asked for, in order."""

    calls: list[Any] = field(default_factory=list)

    def begin(self, curve: str, known: str | None) -> str:
        self.calls.append(("begin", curve, known))
        return known or f"id of {curve}"

    def log(self, curve: str, values: Mapping[str, float], epoch: int) -> None:
        self.calls.append((curve, dict(values), epoch))

    def end(self) -> None:
        self.calls.append("end")


class Down(Sent):
    """A service that nobody reaches."""

    def log(self, curve: str, values: Mapping[str, float], epoch: int) -> None:
        self.calls.append(curve)
        raise ConnectionError("no\nroute")


def test_a_resumed_run_continues_the_same_curves_and_sends_each_point_once(tmp_path: Path) -> None:
    first, second = Sent(), Sent()
    tracker = Tracker(tmp_path, RECIPE, first)
    tracker.begin("world", [], 0)
    for line in EPOCHS[:2]:
        tracker.add("world", line, 2)
    assert first.calls == [
        ("begin", "world", None),
        ("world", {"train_loss": 1.0}, 1),
        ("world", {"train_loss": 0.5}, 2),
    ]
    resumed = Tracker(tmp_path, RECIPE, second)
    resumed.begin("world", EPOCHS[:1], 1)  # from a save after one epoch
    for line in (*EPOCHS[1:], END):
        resumed.add("world", line, 3)
    resumed.begin("world", [*EPOCHS, END], 3)  # as at a run's end
    resumed.end()
    assert second.calls == [
        ("begin", "world", "id of world"),
        ("world", {"train_loss": 1 / 3}, 3),
        ("begin", "average", None),
        ("average", {"test_accuracy": 0.5}, 4),
        "end",
    ]


def test_a_service_that_fails_is_left_alone_after_one_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    down = Down()
    tracker = Tracker(tmp_path, RECIPE, down)
    for line in EPOCHS:
        tracker.add("world", line, 3)
    tracker.end()
    assert down.calls == [("begin", "world", None), "world"]
    (warning,) = capfd.readouterr().err.splitlines()
    assert warning == (
        "swap-hpc: warning: mlflow failed (ConnectionError: no route): "
        "the run goes on without it, its metrics are in its folder"
    )


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    missing = 'tracker = "mlflow", but mlflow is not installed: pip install mlflow-skinny, or --set'
    with pytest.raises(UserError, match=missing):
        check_tracker(RECIPE)
    check_tracker(tiny.recipe())
    assert tracker_of(tiny.recipe(), tmp_path) is None


def run_twice(recipe: Any, out: Path) -> None:
    """Send phase 1 in two starts, the second from a save after one epoch, and the average."""
    for begin, lines in (([], EPOCHS[:2]), (EPOCHS[:1], [*EPOCHS[1:], END])):
        tracker = tracker_of(recipe, out)
        assert tracker
        tracker.begin("world", begin, 3)
        for line in lines:
            tracker.add("world", line, 3)
        tracker.end()
        assert not tracker.has_failed
        time.sleep(1.1)  # W&B names folders by the second


def test_mlflow_holds_every_epoch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install it")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    run_twice(RECIPE, tmp_path)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("recipe")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    world, average = (runs[f"{tmp_path.name} {curve}"] for curve in ("world", "average"))
    history = client.get_metric_history(world.info.run_id, "train_loss")
    assert {each.step: each.value for each in history} == {1: 1, 2: 1 / 2, 3: 1 / 3}
    assert len(history) == 3 and world.info.status == "FINISHED"
    assert world.data.params["large_batch.batch_size"] == "24"
    assert average.data.metrics == {"test_accuracy": 0.5}


def records(file: Path) -> Iterator[bytes]:
    """Yield the records of a W&B file: 7 bytes, then LevelDB's log format, in blocks of 32 KiB."""
    content, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the end of one
            yield record
            record = b""


def test_wandb_holds_every_epoch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install it")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    run_twice(tiny.recipe(tracker="wandb"), tmp_path)
    found: dict[str, dict[int, Any]] = {}
    for file in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        read = [Record.FromString(each) for each in records(file)]
        names = {each.run.display_name for each in read if each.run.display_name}
        assert len(names) == 1, (file, file.stat().st_size, [*map(str, read)])
        (name,) = names
        for each in read:
            items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in each.history.item}
            if items:
                epochs = found.setdefault(name, {})
                assert items["_step"] not in epochs
                epochs[items["_step"]] = items.get("train_loss") or items.get("test_accuracy")
    assert found == {
        f"{tmp_path.name} world": {1: 1, 2: 1 / 2, 3: 1 / 3},
        f"{tmp_path.name} average": {4: 0.5},
    }


def test_jobs_of_single_parts_send_each_epoch_once_behind_those_of_phase_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe(
        data={"name": "synthetic", "samples": 96, "image_size": 8},
        augment={"pad": 0, "cutout": 0},
        batchnorm={"batch_size": 20, "samples": 80},
        large_batch={"epochs": 3},
        refine={"epochs": 2},
    )
    sent = Sent()
    monkeypatch.setattr(record, "tracker_of", lambda recipe, out: Tracker(out, recipe, sent))
    for part in (PHASE_1, refinement_of(0), Part(Phase.AVERAGE)):
        console, started = Console(quiet=True), time.perf_counter()
        train(recipe, tmp_path, Team.world(), console, Control(), started, part)
    points = [(call[0], call[2]) for call in sent.calls if call != "end" and call[0] != "begin"]
    assert points == [
        *(("world", epoch) for epoch in (1, 2, 3)),
        *(("group-000", epoch) for epoch in (4, 5)),
        ("average", 5),
    ]
