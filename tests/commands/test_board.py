"""TensorBoard's files hold the same as the JSON lines, also after a run has been resumed."""

import json
from pathlib import Path

import tiny
from launch import settings, swap_hpc
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from swap_hpc.run.board import Board

# Phase 1 may take nine epochs, and ends after its first.
FIELDS = settings(
    "tensorboard=true",
    "groups=2",
    "model.width=4",
    "large_batch.epochs=9",
    "large_batch.stop_accuracy=0.01",
    "refine.epochs=2",
)


def shown(folder: Path, tag: str) -> dict[int, float]:
    """Return the value of each epoch of a TensorBoard run; assert one value per epoch."""
    events = EventAccumulator(str(folder)).Reload().Scalars(tag)
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


def test_every_group_is_a_separate_run(tmp_path: Path) -> None:
    line = ("train", "digits", "--out", str(tmp_path), *FIELDS)
    # The second start resumes from the first one's checkpoints.
    for part in (("--phase", "large_batch"), ()):
        done = swap_hpc(*line, *part, ranks=2)
        assert done.code == 0, done.stderr
    board = tmp_path / "tensorboard"
    assert {path.name for path in board.iterdir()} == {"world", "group-000", "group-001", "average"}
    for group in (0, 1):
        name = f"group-{group:03d}"
        text = (tmp_path / "metrics" / f"{name}.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        for tag in ("train_loss", "test_accuracy", "learning_rate"):
            found = shown(board / name, tag)
            assert found.keys() == {2, 3}
            for line in lines:
                assert abs(found[1 + line["epoch"]] - line[tag]) < 1e-6
    result = json.loads((tmp_path / "result.json").read_text())
    average = shown(board / "average", "test_accuracy")
    assert average.keys() == {3} and abs(average[3] - result["test_accuracy"]["averaged"]) < 1e-6
    assert shown(board / "world", "test_accuracy").keys() == {1}


def test_what_begins_anew_holds_no_earlier_averages(tmp_path: Path) -> None:
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
