"""What a start finds in a run's folder: nothing trained, or a run of another recipe."""

from pathlib import Path

import pytest
import tiny

from swap_hpc.errors import UserError
from swap_hpc.recipe.phase import refinement_of
from swap_hpc.run.claim import claim, finished, take_over

OTHER = tiny.recipe(seed=7)


def failed_start(out: Path) -> None:
    """Leave what a start of `OTHER` leaves that fails in its first epoch."""
    claim(OTHER, out, None)
    for name in (
        "metrics/world.jsonl",
        "tensorboard/world/events",
        "diverged.json",
        "checkpoints/large_batch-best-00001.safetensors",
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")


def test_a_start_that_saved_nothing_does_not_lock_its_folder(tmp_path: Path) -> None:
    failed_start(tmp_path)
    assert take_over(OTHER, tmp_path, None) == "" and (tmp_path / "metrics/world.jsonl").exists()
    assert finished(tiny.recipe(), tmp_path) is None
    with pytest.raises(
        UserError, match=r"another recipe \(seed differ\), whose jobs may be running"
    ):
        take_over(tiny.recipe(), tmp_path, refinement_of(0))  # shares the folder with other jobs
    line = take_over(tiny.recipe(), tmp_path, None)
    assert line.startswith(f"{tmp_path} held a start of another recipe (seed differ) that had sa")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints/large_batch-00001-0000000.safetensors",
        "large_batch.safetensors",
        "snapshots/large_batch-00001.safetensors",
        "result.json",
    ],
)
def test_what_was_trained_is_kept_from_another_recipe(name: str, tmp_path: Path) -> None:
    failed_start(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"holds a run of another recipe \(seed differ\)"):
        finished(tiny.recipe(), tmp_path)
    assert take_over(tiny.recipe(), tmp_path, None) == ""
    assert (tmp_path / "metrics/world.jsonl").exists()
