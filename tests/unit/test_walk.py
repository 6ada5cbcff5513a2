"""Folders as people have them: nested, linked, with broken links and pipes in them.

Every file is found, and every entry that is not a file is reported.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swap_hpc.data import load
from swap_hpc.data.folders import folder_files
from swap_hpc.data.splits import Arrays
from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.inputs import Data


def make(root: Path, *names: str) -> Path:
    """Make two classes with one image in each split, and the images `names` in `train/cat`."""
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            picture(root / split / name / "0.png", label)
    for name in names:
        picture(root / "train" / "cat" / name, 0)
    return root


def picture(path: Path, label: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 5, 3), 40 + 100 * label, np.uint8)).save(path, "PNG")


def found(root: Path) -> list[str]:
    return [os.path.relpath(path, root / "train") for path in folder_files(root)[0]["train"].paths]


def test_a_flat_folder_has_the_order_of_its_names(tmp_path: Path) -> None:
    names = ["b.png", "a.png", "B.png", "10.png", "9.png", "ä.png", "a b.png", "no extension"]
    cats = [f"cat/{name}" for name in sorted([*names, "0.png"])]
    assert found(make(tmp_path, *names)) == [*cats, "dog/0.png"]
    assert folder_files(tmp_path)[0]["train"].notes == ()


def test_nested_and_linked_folders_are_walked_and_hidden_ones_are_not(tmp_path: Path) -> None:
    visible, hidden = ("more/1.png", "more/deep/er/2.png"), (".hidden/3.png", "more/.4.png")
    root = make(tmp_path / "images", *visible, *hidden)
    picture(tmp_path / "elsewhere" / "5.png", 0)
    (root / "train" / "cat" / "link").symlink_to("../../../elsewhere")
    (root / "train" / "cat" / "6.png").symlink_to("more/1.png")
    nested = ["0.png", "6.png", "link/5.png", *visible]
    assert found(root) == [*(f"cat/{name}" for name in nested), "dog/0.png"]
    assert folder_files(root)[0]["train"].notes == ()


@pytest.mark.parametrize("target", [".", "..", "../..", "../../cat", "/"])
def test_links_back_to_a_folder_above_are_left_out(target: str, tmp_path: Path) -> None:
    root = make(tmp_path, "more/1.png")
    back = root / "train" / "cat" / "more" / "back"
    back.symlink_to(target)
    assert found(root) == ["cat/0.png", "cat/more/1.png", "dog/0.png"]
    (note,) = folder_files(root)[0]["train"].notes
    reason = f"1 link back to a folder above it ({back})"
    assert note == f"1 entry in {root}/train is left out: {reason}"


@pytest.mark.parametrize("every", [None, 2])
def test_what_is_not_a_file_is_left_out_and_reported(every: int | None, tmp_path: Path) -> None:
    root = make(tmp_path, "1.png", "more/2.png")
    train = root / "train"
    (train / "cat" / "more" / "x.png").symlink_to("/nowhere/x.png")
    (train / "cat" / "a.png").symlink_to("a.png")  # to itself
    (train / "wolf").symlink_to("/nowhere/wolf")  # where a class would be
    os.mkfifo(train / "dog" / "pipe.png")
    (train / "labels.csv").write_text("a,b")  # beside the classes: of no class
    picture(train / "dog" / "1.png", 1)
    path = train if every else root
    data = load(Data(name="folder", path=path, test_every=every, validation=1), Team.alone(), 1)
    first = min(f"{train}/{name}" for name in ("cat/more/x.png", "cat/a.png", "wolf"))
    reasons = f"3 broken links (first: {first}), 1 special file ({train}/dog/pipe.png)"
    assert data.notes == (f"4 entries in {train} are left out: {reasons}",)
    assert data.validation and len(data.train) + len(data.validation) == (2 if every else 5)


def test_a_class_of_broken_links_is_empty_and_the_message_has_the_reason(tmp_path: Path) -> None:
    root = make(tmp_path)
    (root / "train" / "dog" / "0.png").unlink()
    for i in range(3):
        (root / "train" / "dog" / f"{i}.png").symlink_to("/nowhere")
    left_out = r"\(left out: 3 broken links \(first: .*/dog/0.png\)\)"
    with pytest.raises(UserError, match=rf"train/dog is empty {left_out}: put the class's images"):
        folder_files(root)


def test_a_folder_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make(tmp_path, "more/1.png")
    scan = os.scandir

    def refusing(path: Path) -> object:
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="cannot read the folder .*/cat/more: Permission denied"):
        folder_files(root)


def test_ranks_compare_the_places_in_the_folder_and_not_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make(tmp_path / "one", "a/1.png", "b/2.png")
    picture(one / "train" / "dog" / "1.png", 1)
    other = Path(shutil.copytree(one, tmp_path / "another" / "place"))
    monkeypatch.chdir(other / "train")
    split = [one, other, Path(".."), Path("../../place")]
    not_split = [one / "train", other / "train", Path(), Path("../train")]
    for places, every in ((split, None), (not_split, 2)):
        contents = {contents_of(place, every) for place in places}
        assert len(contents) == 1
    # the same names in another order
    (other / "train" / "cat" / "a").rename(other / "train" / "cat" / "c")
    assert folder_files(one)[0]["train"].contents != folder_files(other)[0]["train"].contents


def contents_of(path: Path, test_every: int | None) -> tuple[str, ...]:
    """Return what ranks compare of a folder that is read in every epoch."""
    size = ((0, 4),)
    data = Data(name="folder", path=path, test_every=test_every, image_size=size, memory_gib=0)
    return load(data, Team.alone(), 1).train.contents


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    """Both into memory, and in every epoch."""
    latin = os.fsdecode(b"caf\xe9")
    root = make(tmp_path)
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / latin)
    picture(root / "train" / latin / f"{latin}.png", 1)
    data = load(Data(name="folder", path=root), Team.alone(), 1)
    assert isinstance(data.train, Arrays) and data.classes == (latin, "cat")
    assert data.train.images.mean((1, 2, 3)).tolist() == [140, 140, 40]
    assert contents_of(root, None) == folder_files(root)[0]["train"].contents
    damaged = root / "train" / latin / "0.png"
    damaged.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot decode the image .*/caf\udce9/0.png"):
        load(Data(name="folder", path=root), Team.alone(), 1)
