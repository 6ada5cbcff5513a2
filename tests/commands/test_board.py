"""TensorBoard's files hold what the JSON lines do, also after a run went on where it stopped."""

import json
from pathlib import Path

from launch import swap_hpc
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FIELDS = ("tensorboard=true", "groups=2", "model.width=4", "large_batch.epochs=2", "refine.epochs=2")


def shown(folder: Path, tag: str) -> dict[int, float]:
    """Epoch -> value of one of TensorBoard's runs; two values for one epoch fail."""
    events = EventAccumulator(str(folder)).Reload().Scalars(tag)
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


def test_every_group_is_a_run_of_its_own(tmp_path: Path) -> None:
    fields = [word for field in FIELDS for word in ("--set", field)]
    for part in (("--phase", "large_batch"), ()):  # the second start goes on from the first one's checkpoints
        done = swap_hpc("train", "digits", "--out", tmp_path, *fields, *part, ranks=2)
        assert done.code == 0, done.stderr
    board = tmp_path / "tensorboard"
    assert {path.name for path in board.iterdir()} == {"world", "group-000", "group-001", "average"}
    for group in (0, 1):
        name = f"group-{group:03d}"
        lines = [json.loads(line) for line in (tmp_path / "metrics" / f"{name}.jsonl").read_text().splitlines()]
        for tag in ("train_loss", "test_accuracy", "learning_rate"):
            found = shown(board / name, tag)
            assert found.keys() == {3, 4}
            for line in lines:
                assert abs(found[2 + line["epoch"]] - line[tag]) < 1e-6
    result = json.loads((tmp_path / "result.json").read_text())
    average = shown(board / "average", "test_accuracy")
    assert average.keys() == {4} and abs(average[4] - result["test_accuracy"]["averaged"]) < 1e-6
