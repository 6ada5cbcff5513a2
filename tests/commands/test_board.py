"""TensorBoard's files hold what the JSON lines do, also after a run went on where it stopped."""

import json
from pathlib import Path

import tiny
from launch import swap_hpc
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from swap_hpc.run.board import Board

# phase 1 may have nine epochs, and ends with its first
FIELDS = (
    "tensorboard=true",
    "groups=2",
    "model.width=4",
    "large_batch.epochs=9",
    "large_batch.stop_accuracy=0.01",
    "refine.epochs=2",
)


def shown(folder: Path, tag: str) -> dict[int, float]:
    """Epoch -> value of one of TensorBoard's runs; two values for one epoch fail."""
    events = EventAccumulator(str(folder)).Reload().Scalars(tag)
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


def test_every_group_is_a_run_of_its_own(tmp_path: Path) -> None:
    fields = [word for field in FIELDS for word in ("--set", field)]
    for part in (
        ("--phase", "large_batch"),
        (),
    ):  # the second start goes on from the first one's checkpoints
        done = swap_hpc("train", "digits", "--out", tmp_path, *fields, *part, ranks=2)
        assert done.code == 0, done.stderr
    board = tmp_path / "tensorboard"
    assert {path.name for path in board.iterdir()} == {"world", "group-000", "group-001", "average"}
    for group in (0, 1):
        name = f"group-{group:03d}"
        lines = [
            json.loads(line)
            for line in (tmp_path / "metrics" / f"{name}.jsonl").read_text().splitlines()
        ]
        for tag in ("train_loss", "test_accuracy", "learning_rate"):
            found = shown(board / name, tag)
            assert found.keys() == {2, 3}
            for line in lines:
                assert abs(found[1 + line["epoch"]] - line[tag]) < 1e-6
    result = json.loads((tmp_path / "result.json").read_text())
    average = shown(board / "average", "test_accuracy")
    assert average.keys() == {3} and abs(average[3] - result["test_accuracy"]["averaged"]) < 1e-6
    assert shown(board / "world", "test_accuracy").keys() == {1}


def test_what_is_begun_anew_holds_no_averages_of_before(tmp_path: Path) -> None:
    board = Board(tmp_path, tiny.recipe())
    lines = [
        {"phase": "evaluation", "model": "average", "epoch": epoch, "test_accuracy": 0.5}
        for epoch in (1, 2)
    ]
    for line in lines:
        board.add("world", line, 3)
    board.begin("world", [], 3)
    board.add("world", lines[0], 3)
    assert shown(tmp_path / "average", "test_accuracy") == {4: 0.5}
