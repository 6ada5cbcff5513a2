"""A change of the data between two starts is found and named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from swap_hpc.data.dataset import Dataset
from swap_hpc.data.identity import Identity
from swap_hpc.data.sources import folder
from swap_hpc.data.splits import Arrays
from swap_hpc.recipe.inputs import Data


def images(path: Path, classes: tuple[str, ...] = ("ant", "bee", "cat"), number: int = 3) -> Path:
    for split in ("train", "test"):
        for name in classes:
            (path / split / name).mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (4, 4), (i, 9, 9)).save(path / split / name / f"{i}.png")
    return path


def identity(path: Path) -> Identity:
    return Identity.of(folder(Data(name="folder", path=path)))


def test_the_same_data_elsewhere_are_the_same(tmp_path: Path) -> None:
    one, other = identity(images(tmp_path / "here")), identity(images(tmp_path / "there"))
    assert one == other and one.differ(other) is None
    assert Identity.from_json(one.to_json()) == one


def test_the_change_is_named(tmp_path: Path) -> None:
    then = identity(images(tmp_path))
    cat = tmp_path / "train" / "cat"
    (cat / "0.png").rename(cat / "9.png")
    renamed = "9 training samples then, other names, labels or contents"
    assert then.differ(identity(tmp_path)) == renamed
    (cat / "0.png").write_bytes((cat / "9.png").read_bytes())
    assert then.differ(identity(tmp_path)) == "9 training samples then, 10 now"
    assert then.differ(identity(tmp_path), ["test"]) is None
    for split in ("train", "test"):
        (tmp_path / split / "bee").rename(tmp_path / split / "wasp")
    now = identity(tmp_path)
    assert then.differ(now) == then.classes_differ(now) == "other classes: bee then, wasp now"


def test_classes_in_another_order_differ() -> None:
    then = Identity.of(tiny.dataset())
    reordered = replace(tiny.dataset(), classes=("b", "a", "c"))
    assert then.classes_differ(Identity.of(reordered)) == "the classes in another order"


@pytest.mark.parametrize("changed", ["images", "labels"])
def test_data_in_memory_are_identified_by_their_contents(changed: str) -> None:
    def made(shift: int) -> Dataset:
        data = tiny.dataset()
        assert isinstance(data.train, Arrays)
        images, labels = data.train.images, data.train.labels
        if changed == "images":
            images = np.roll(images, shift, axis=0)
        else:
            labels = np.roll(labels, shift)
        return replace(data, train=Arrays(images, labels))

    then, now = Identity.of(made(0)), Identity.of(made(1))
    assert then == Identity.of(made(0))
    assert "other names, labels or contents" in (then.differ(now) or "")
