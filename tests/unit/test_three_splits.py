"""Three splits: where each comes from, and what keeps them apart."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from swap_hpc.data import Batches, Picks, load
from swap_hpc.data.dataset import Dataset, with_validation
from swap_hpc.data.identity import Identity
from swap_hpc.data.pack import pack
from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.inputs import Data

SIZES = {"train": 4, "val": 3, "test": 2}  # images of each of two classes


class Transformed(torch.utils.data.Dataset[Any]):
    """A data set of 9 samples whose transform adds 10 to their numbers."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Any:
        return torch.full((1,), 10.0 + index), 0.0


def loaded(**fields: Any) -> Dataset:
    return load(Data(**fields), Team.alone(), threads=1)


def make_folder(root: Path, *splits: str) -> Path:
    """Make images of one grey each: those of a split are brighter than those of the one before."""
    for place, split in enumerate(splits):
        for label, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(SIZES[split]):
                grey = np.full((6, 6, 3), 60 * place + 20 * label + i, np.uint8)
                Image.fromarray(grey).save(folder / f"{i}.png")
    return root


def greys(split: Any) -> list[int]:
    return sorted(split.images[:, 0, 0, 0].tolist())


def sizes(data: Dataset) -> dict[str, int]:
    return {name: len(split) for name, split in data.splits.items()}


def test_all_folders_of_a_folder_and_of_its_shards_are_used(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", "train", "val", "test")
    said: list[str] = []
    pack(folder, tmp_path / "shards", 3, Team.alone(), said.append)
    assert "val: 2 of 2 shards" in said
    for data in (
        loaded(name="folder", path=folder),
        loaded(name="webdataset", path=tmp_path / "shards"),
    ):
        assert sizes(data) == {"train": 8, "validation": 6, "test": 4} and data.notes == ()
        assert data.chosen_by == "validation"
        assert greys(data.validation) == [60, 61, 62, 80, 81, 82]
        assert greys(data.test) == [120, 121, 140, 141]


def test_streamed_splits_are_three_as_well(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "train", "val", "test")
    data = loaded(name="folder", path=folder, memory_gib=0, image_size=6)
    assert sizes(data) == {"train": 8, "validation": 6, "test": 4}


def test_val_alone_is_the_test_split_and_a_line_says_so(tmp_path: Path) -> None:
    data = loaded(name="folder", path=make_folder(tmp_path, "train", "val"))
    assert sizes(data) == {"train": 8, "test": 6} and data.chosen_by == "test"
    assert data.notes == (
        f"{tmp_path}/val is the test split, and there is no validation split: no {tmp_path}/test",
    )


@pytest.mark.parametrize("name", ["valid", "validation", "dev", "Val"])
def test_a_folder_called_like_a_split_is_read_refused_or_told(name: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", "train", "val", "test")
    (folder / "val").rename(folder / name)
    refused = rf"images/{name} is not read: call it val, or move it to another place"
    said: list[str] = []
    with pytest.raises(UserError, match=refused):
        loaded(name="folder", path=folder)
    with pytest.raises(UserError, match=refused):
        pack(folder, tmp_path / "shards", 3, Team.alone(), said.append)
    make_folder(folder, "val")
    line = f"{folder / name} is not read: {folder / 'val'} is the val split"
    assert loaded(name="folder", path=folder).notes == (line,)
    pack(folder, tmp_path / "shards", 3, Team.alone(), said.append)
    assert said[0] == line
    (tmp_path / "shards" / "val").rename(tmp_path / "shards" / name)
    with pytest.raises(UserError, match=rf"shards/{name} is not read: call it val"):
        loaded(name="webdataset", path=tmp_path / "shards")


def test_val_has_the_classes_of_train(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "train", "val", "test")
    (folder / "val" / "dog").rename(folder / "val" / "wolf")
    with pytest.raises(UserError, match=r"train and val have different classes \(dog, wolf\)"):
        loaded(name="folder", path=folder)


def test_samples_set_aside_leave_the_test_split_as_it_is(tmp_path: Path) -> None:
    whole, data = loaded(name="digits"), loaded(name="digits", validation=100)
    assert sizes(data) == {"train": 1098, "validation": 100, "test": 599}
    assert data.test.contents == whole.test.contents
    both: Any = (data.train, data.validation)
    together = np.concatenate([split.images for split in both])
    everything: Any = whole.train
    assert sorted(map(bytes, together)) == sorted(map(bytes, everything.images))
    folder = make_folder(tmp_path, "train", "val", "test")
    with pytest.raises(UserError, match="data.validation = 2, but the data have a validation"):
        loaded(name="folder", path=folder, validation=2)


def test_arrays_of_ones_own_may_be_three_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ModuleType("own_splits")
    monkeypatch.setitem(sys.modules, "own_splits", own)

    def pair(number: int, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
        return np.full((number, size, size, 3), number, np.uint8), np.arange(number) % 3

    own.load = lambda path: (pair(9), pair(5), pair(4))  # type: ignore[attr-defined]
    data = loaded(name="own_splits:load")
    assert sizes(data) == {"train": 9, "validation": 5, "test": 4} and len(data.classes) == 3
    assert greys(data.validation) == [5] * 5
    own.load = lambda path: (pair(9), pair(5, 6), pair(4))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"and validation images of \[6, 6, 3\]"):
        loaded(name="own_splits:load")
    own.load = lambda path: (pair(9), pair(9), pair(9), pair(9))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="returned a tuple: a Dataset, or"):
        loaded(name="own_splits:load")


def test_samples_set_aside_are_read_without_transforms_or_a_line_says_so() -> None:
    def set_aside(split: Batches) -> Dataset:
        return with_validation(Dataset(split, split, ("a", "b")), 3)

    plain = TensorDataset(torch.arange(9.0)[:, None], torch.zeros(9))
    assert set_aside(Batches.of(plain)).notes == ()
    (line,) = set_aside(Batches.of(Transformed())).notes
    assert "with the training data set's transforms" in line and "evaluated=" in line
    for workers in (0, 1):
        data = set_aside(Batches.of(Transformed(), workers=workers, evaluated=plain))
        assert data.notes == () and isinstance(data.validation, Batches)
        for training, first in ((True, 10), (False, 0), (True, 10)):
            pick = Picks(np.arange(3), None)
            ((inputs, _),) = data.validation.read(iter([pick]), training)
            assert ((first <= inputs) & (inputs < first + 9)).all()
    with pytest.raises(UserError, match=r"got 9 samples, and 4 in evaluated: give both the same"):
        Batches.of(Transformed(), evaluated=TensorDataset(torch.zeros(4, 1)))


def test_other_validation_samples_are_other_data(tmp_path: Path) -> None:
    two = Identity.of(loaded(name="digits"))
    three = Identity.of(loaded(name="digits", validation=100))
    assert "validation" not in two.to_json()  # as files of earlier versions have it
    for each in (two, three):
        assert Identity.from_json(each.to_json()) == each
    folder = make_folder(tmp_path, "train", "val", "test")
    then = Identity.of(loaded(name="folder", path=folder))
    (folder / "val" / "cat" / "0.png").rename(folder / "val" / "cat" / "9.png")
    now = Identity.of(loaded(name="folder", path=folder))
    assert then.differ(now, ["train", "test"]) is None
    found = then.differ(now)
    assert found == "6 validation samples then, other names, labels or contents"
    (folder / "val").rename(folder / "other")
    found = then.differ(Identity.of(loaded(name="folder", path=folder)))
    assert found == "6 validation samples then, 0 now"
