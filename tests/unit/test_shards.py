"""Shards hold what the folder held: in DALI's own eyes, and as we read them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import imagenet_like
import numpy as np
import pytest
import tiny
from nvidia.dali import fn
from nvidia.dali.pipeline import pipeline_def
from PIL import Image

from swap_hpc.data import load, loader
from swap_hpc.data.dataset import Dataset
from swap_hpc.data.pack import pack
from swap_hpc.data.sampling import Picks
from swap_hpc.data.shards import LABELS, find_shards
from swap_hpc.data.sources import folder_files
from swap_hpc.data.splits import Arrays
from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.schema import Augment, Data, DataName

ONE = Team.alone()


def loaded(name: DataName, path: Path, side: int, **fields: Any) -> Dataset:
    return load(Data(name=name, path=path, image_size=((0, side),), **fields), ONE, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imagenet_like.make(tmp_path_factory.mktemp("images"), classes=7, train=5, test=3)


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    said: list[str] = []
    assert pack(folder, out, 10, ONE, said.append) == 4 + 3
    assert said[-1] == "test: 3 of 3 shards"
    return out


def test_every_file_comes_back_in_the_folders_order(folder: Path, shards: Path) -> None:
    train, test, _ = folder_files(folder)
    for split, files in (("train", train), ("test", test)):
        found = find_shards(shards / split)
        assert [found.read(i).tobytes() for i in range(len(found))] == [
            Path(path).read_bytes() for path in files.paths
        ]
        assert (found.labels == files.labels).all()
        assert len(set(found.tar[:5])) > 1  # a class lies in several tar files


def test_the_index_is_what_dalis_tool_writes(shards: Path, tmp_path: Path) -> None:
    tool = Path(sys.executable).with_name("wds2idx")
    for tar in sorted((shards / "train").glob("*.tar")):
        subprocess.run([tool, tar, tmp_path / "theirs.idx"], check=True, capture_output=True)
        assert (tmp_path / "theirs.idx").read_text().split() == tar.with_suffix(
            ".idx"
        ).read_text().split()


def test_dalis_reader_reads_them(shards: Path) -> None:
    tars = sorted((shards / "train").glob("*.tar"))

    def graph() -> Any:
        indices = [str(tar.with_suffix(".idx")) for tar in tars]
        read = fn.readers.webdataset(
            paths=[*map(str, tars)],
            index_paths=indices,
            ext=["jpeg", "cls"],
            missing_component_behavior="error",
        )
        return tuple(read)  # type: ignore[arg-type]

    images, labels = pipeline_def(graph)(batch_size=35, num_threads=1, device_id=None).run()
    found = find_shards(shards / "train")
    theirs = sorted(
        (np.array(images[i]).tobytes(), int(np.array(labels[i]).tobytes())) for i in range(35)
    )
    assert theirs == sorted((found.read(i).tobytes(), int(found.labels[i])) for i in range(35))


@pytest.mark.parametrize("without", ["index", "labels", "both", "old index"])
def test_shards_of_others_need_neither_our_labels_nor_an_index(
    shards: Path, tmp_path: Path, without: str
) -> None:
    ours = find_shards(shards / "train")
    theirs = Path(shutil.copytree(shards, tmp_path / "shards")) / "train"
    if without in ("labels", "both"):
        (theirs / LABELS).unlink()
    if without in ("index", "both"):
        for index in theirs.glob("*.idx"):
            index.unlink()
    if without == "old index":
        for index in theirs.glob("*.idx"):
            index.write_text(index.read_text().replace("v1.2", "v1.1"))
    found = find_shards(theirs)
    assert (
        (found.offset == ours.offset).all()
        and (found.labels == ours.labels).all()
        and (found.tar == ours.tar).all()
    )


def test_packing_again_writes_only_what_is_missing(
    folder: Path, shards: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    gone, kept = copy / "train" / "000001.tar", copy / "train" / "000002.tar"
    before, stamp = gone.read_bytes(), kept.stat().st_mtime_ns
    gone.unlink()
    pack(folder, copy, 10, ONE, lambda _: None)
    assert gone.read_bytes() == before and kept.stat().st_mtime_ns == stamp


def test_folder_and_shards_give_the_same_pixels(folder: Path, shards: Path) -> None:
    """Training crops of all kinds of files (grey, CMYK, one pixel), and the evaluation's centre."""
    sets = [
        loaded("folder", folder, 32, memory_gib=0),
        loaded("webdataset", shards, 32, memory_gib=0),
    ]
    draws = np.random.default_rng(0).random((35, 5), dtype=np.float32)
    for view in (
        loader.View(Augment(flip=True)),
        loader.View(None),
        loader.View(None, (20, 20), 0.5),
    ):
        pick = Picks(np.random.default_rng(1).permutation(35), draws if view.augment else None)
        seen = [
            next(loader.batches(data, data.train, iter([pick]), view, 35, tiny.CPU))
            for data in sets
        ]
        assert (seen[0][0] == seen[1][0]).all() and (seen[0][1] == seen[1][1]).all()
        assert seen[0][0].shape == (35, 3, *(view.size or (32, 32)))


def test_small_shards_are_decoded_into_memory_as_a_folder_is(folder: Path, shards: Path) -> None:
    sets = [loaded("folder", folder, 24), loaded("webdataset", shards, 24)]
    one, other = (each.train for each in sets)
    assert isinstance(one, Arrays) and isinstance(other, Arrays)
    assert (one.images == other.images).all() and sets[0].classes == sets[1].classes


NAMES = [
    "Dr. No",
    "x.json",
    "x.txt",
    "x.cls",
    "x.CLS",
    "x.idx",
    "x.npy",
    "x.gz",
    "x.tar",
    "x.ñ",
    "x.jpg~",
    "x.a b",
    "x.",
    "x",
]
NAMES += [
    "a.b.c.JPG",
    "_.png",
    " y.png",
    "two\nlines.p\nng",
    "tab.\tpng",
    os.fsdecode(b"caf\xe9.caf\xe9"),
    f"x.{'long' * 50}",
]
NAMES += ["jpg.jpg", "\u2028.png", "it's.png", "100%.png"]


def test_a_folder_of_any_names_packs_and_reads_back(tmp_path: Path) -> None:
    """The same images and labels in the same order, with an index and without; DALI's tool finds the same samples."""
    classes = ["Dr. No", "a b", "c\x85d", os.fsdecode(b"caf\xe9"), "'", "日本"]
    for number, name in enumerate(NAMES * 2):
        place = tmp_path / "folder" / "train" / classes[number % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(
            np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        )
        picture.save(place / name, "PNG")
    shutil.copytree(tmp_path / "folder" / "train", tmp_path / "folder" / "test")
    pack(tmp_path / "folder", tmp_path / "shards", 9, ONE, lambda _: None)
    for index in ("with an index", "without"):
        places: dict[DataName, str] = {"folder": "folder", "webdataset": "shards"}
        sets = [
            load(Data(name=name, path=tmp_path / place), ONE, 1) for name, place in places.items()
        ]
        for split in ("train", "test"):
            folder, shards = (getattr(data, split) for data in sets)
            assert (folder.images == shards.images).all() and (
                folder.labels == shards.labels
            ).all(), index
        assert sets[0].classes == sets[1].classes == tuple(sorted(classes))
        if index == "with an index":
            tars = sorted((tmp_path / "shards" / "train").glob("*.tar"))
            subprocess.run(
                [Path(sys.executable).with_name("wds2idx"), tars[0], tmp_path / "theirs.idx"],
                check=True,
                capture_output=True,
            )
            assert (tmp_path / "theirs.idx").read_text().split() == tars[0].with_suffix(
                ".idx"
            ).read_text().split()
            for file in (tmp_path / "shards").glob("*/*.idx"):
                file.unlink()
    listed = [
        subprocess.run(["tar", "-tf", tar], capture_output=True, text=True, check=True).stdout
        for tar in tars
    ]
    members = "".join(listed).splitlines()
    assert all(re.fullmatch(r"\d{9}\.(jpg|png|cls)", name) for name in members) and len(
        set(members)
    ) == len(members)


def test_a_class_that_no_line_can_name_is_refused(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "two\nlines").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / split / "two\nlines" / "0.png")
    with pytest.raises(
        UserError, match=r"the class 'two\\nlines' has a line break in its name: rename its folder$"
    ):
        pack(tmp_path, tmp_path / "shards", 9, ONE, lambda _: None)


def test_an_image_that_cannot_be_read_is_named_and_no_shard_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "0.png").touch()

    def refusing(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refusing)
    with pytest.raises(RunError, match="cannot read .*/train/a/0.png: Permission denied$"):
        pack(tmp_path, tmp_path / "shards", 9, ONE, lambda _: None)


def test_packing_says_what_it_leaves_out(folder: Path, tmp_path: Path) -> None:
    copy, said = Path(shutil.copytree(folder, tmp_path / "folder")), list[str]()
    (copy / "test" / "n00000002" / "x.png").symlink_to("/nowhere")
    pack(copy, tmp_path / "shards", 100, ONE, said.append)
    assert (
        said[0]
        == f"1 entry in {copy}/test is left out: 1 broken link ({copy}/test/n00000002/x.png)"
        and len(said) == 3
    )


def test_grey_and_cmyk_images_have_the_colours_that_others_see(folder: Path) -> None:
    """Against Pillow, whose conversion of CMYK knows no profile either."""
    data = load(Data(name="folder", path=folder, image_size=((0, 16),)), ONE, 1)
    files, _, _ = folder_files(folder)
    kinds = set()
    for sample, path in enumerate(files.paths):
        with Image.open(path) as image:
            kinds.add(image.mode)
            theirs = np.asarray(image.convert("RGB")).reshape(-1, 3).mean(0)
        ours = data.train.images[sample].reshape(-1, 3).mean(0)  # type: ignore[union-attr]
        assert np.abs(ours - theirs).max() < 25, (path, ours, theirs)
    assert kinds == {"RGB", "L", "CMYK"}


def damaged(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def test_wrong_shards_are_named(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no .tar files in .*swap-hpc pack makes them"):
        find_shards(tmp_path)
    copy = damaged(shards, tmp_path)
    index = copy / "train" / "000000.idx"
    index.write_text("v1.2 1\njpeg 512\n")
    with pytest.raises(
        UserError, match=r"000000.idx is not a DALI index: make it again with wds2idx"
    ):
        find_shards(copy / "train")
    index.write_text("v1.2 1\njpeg 512 7 a.jpeg\n")
    with pytest.raises(UserError, match=r"the sample a.jpeg needs one image and one .cls file"):
        find_shards(copy / "train")
    (copy / "classes.txt").write_text("one\n")
    shutil.copy(shards / "train" / "000000.idx", index)
    with pytest.raises(UserError, match=r"there is a class 6, but .*classes.txt names 1"):
        load(Data(name="webdataset", path=copy), ONE, 1)


def test_a_damaged_image_in_a_shard_is_named(shards: Path, tmp_path: Path) -> None:
    copy = damaged(shards, tmp_path)
    found = find_shards(copy / "train")
    tar = Path(found.tars[found.tar[4]])
    content = bytearray(tar.read_bytes())
    content[found.offset[4] : found.offset[4] + found.size[4]] = bytes(found.size[4])
    tar.write_bytes(content)
    with pytest.raises(
        UserError,
        match=rf"cannot decode the image at byte {found.offset[4]} of {tar} \(not an image",
    ):
        load(Data(name="webdataset", path=copy, image_size=((0, 8),)), ONE, 1)


def test_a_shard_that_is_cut_off_is_named_and_no_image_blamed(shards: Path, tmp_path: Path) -> None:
    copy = damaged(shards, tmp_path)
    found = find_shards(copy / "train")
    tar = Path(found.tars[-1])
    tar.write_bytes(
        tar.read_bytes()[: int(found.offset[found.tar == len(found.tars) - 1].max()) + 10]
    )
    data = Data(name="webdataset", path=copy, image_size=((0, 8),), memory_gib=0)
    with pytest.raises(RunError, match=rf"{tar} is shorter than its index says"):
        dataset = load(data, ONE, 1)
        picks = iter(
            [
                Picks(
                    np.arange(len(dataset.train)), np.full((len(dataset.train), 5), 0.5, np.float32)
                )
            ]
        )
        list(
            loader.batches(
                dataset, dataset.train, picks, loader.View(Augment()), len(dataset.train), tiny.CPU
            )
        )


def test_shards_that_tar_made_of_folders_are_read(folder: Path, tmp_path: Path) -> None:
    """Names with `./`, folders with dots, no index, labels in `.cls` files of their own."""
    train, _, _ = folder_files(folder)
    for i in range(8):
        place = tmp_path / "all" / f"v1.{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(train.paths[i], place / f"{i}.input.jpg")
        (place / f"{i}.cls").write_text(str(train.labels[i]))
    split = tmp_path / "train"
    split.mkdir()
    subprocess.run(
        ["tar", "--sort=name", "-C", tmp_path / "all", "-cf", split / "a.tar", "."], check=True
    )
    (split / "a.idx").touch()  # empty: as if there were none
    found = find_shards(split)
    assert sorted(found.read(i).tobytes() for i in range(8)) == sorted(
        Path(path).read_bytes() for path in train.paths[:8]
    )
    shutil.copy(split / "a.tar", split / "b.tar")
    with pytest.raises(UserError, match="hold the sample ./v1.0/0 twice"):
        find_shards(split)


def test_another_packing_into_the_same_folder_is_refused(
    folder: Path, shards: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    other = Path(shutil.copytree(folder, tmp_path / "folder"))
    with pytest.raises(
        UserError, match="holds shards of other images, or of another --samples-per-shard"
    ):
        pack(folder, copy, 9, ONE, lambda _: None)
    next((other / "train").glob("*/*")).unlink()
    with pytest.raises(UserError, match="choose another folder, or remove it"):
        pack(other, copy, 10, ONE, lambda _: None)
    (copy / "packing.json").unlink()
    with pytest.raises(UserError, match="holds shards of other images"):
        pack(folder, copy, 10, ONE, lambda _: None)
    np.save(copy / "train" / LABELS, np.zeros(3, np.int64))
    with pytest.raises(
        UserError, match=r"labels.npy has 3 labels, the .tar files hold 35 samples: pack again"
    ):
        find_shards(copy / "train")
