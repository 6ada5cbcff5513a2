"""Shards hold what the folder held, as DALI's reader and the package's read them."""

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
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import pipeline_def
from PIL import Image
from torch import Tensor

from swap_hpc.data import load, loader
from swap_hpc.data.dataset import Dataset
from swap_hpc.data.folders import folder_files
from swap_hpc.data.pack import pack
from swap_hpc.data.sampling import Picks
from swap_hpc.data.shards import LABELS, find_shards
from swap_hpc.data.splits import Arrays
from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.augment import Augment
from swap_hpc.recipe.inputs import Data
from swap_hpc.recipe.values import DataName

ONE = Team.alone()


def loaded(name: DataName, path: Path, side: int, **fields: Any) -> Dataset:
    return load(Data(name=name, path=path, image_size=((0, side),), **fields), ONE, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imagenet_like.make(tmp_path_factory.mktemp("images"), classes=7, train=5, test=3)


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    lines: list[str] = []
    assert pack(folder, out, 10, ONE, lines.append) == 4 + 3
    assert lines[-1] == "test: 3 of 3 shards"
    return out


def test_every_file_comes_back_in_the_folders_order(folder: Path, shards: Path) -> None:
    splits, _ = folder_files(folder)
    train, test = splits["train"], splits["test"]
    for split, files in (("train", train), ("test", test)):
        found = find_shards(shards / split)
        read = [found.read(i).tobytes() for i in range(len(found))]
        assert read == [Path(path).read_bytes() for path in files.paths]
        assert (found.labels == files.labels).all()
        assert len(set(found.tar[:5])) > 1  # a class lies in several tar files


def test_the_index_is_what_dalis_tool_writes(shards: Path, tmp_path: Path) -> None:
    for tar in sorted((shards / "train").glob("*.tar")):
        assert index_by_dali(tar, tmp_path) == tar.with_suffix(".idx").read_text().split()


def index_by_dali(tar: Path, folder: Path) -> list[str]:
    """Return the fields of the index that DALI's wds2idx makes of a tar file."""
    tool, index = Path(sys.executable).with_name("wds2idx"), folder / "theirs.idx"
    subprocess.run([tool, tar, index], check=True, capture_output=True)
    return index.read_text().split()


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
    encoded = [np.array(images[i]).tobytes() for i in range(35)]
    theirs = zip(encoded, (int(np.array(labels[i]).tobytes()) for i in range(35)), strict=True)
    ours = [(found.read(i).tobytes(), int(found.labels[i])) for i in range(35)]
    assert sorted(theirs) == sorted(ours)


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
    assert (found.tar == ours.tar).all() and (found.offset == ours.offset).all()
    assert (found.labels == ours.labels).all()


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
    of_folder = loaded("folder", folder, 32, memory_gib=0)
    of_shards = loaded("webdataset", shards, 32, memory_gib=0)
    order = np.random.default_rng(1).permutation(35)
    draws = np.random.default_rng(0).random((35, 5), dtype=np.float32)

    def batch(data: Dataset, view: loader.View) -> tuple[Tensor, Tensor]:
        pick = Picks(order, draws if view.augment else None)
        return next(loader.batches(data, data.train, iter([pick]), view, 35, tiny.CPU))

    training = loader.View(Augment(flip=True, crop_area=(0.08, 1.0)))
    centre = loader.View(None)
    small = loader.View(None, (20, 20), 0.5)
    for view in (training, centre, small):
        images, labels = batch(of_folder, view)
        packed, packed_labels = batch(of_shards, view)
        assert torch.equal(images, packed) and torch.equal(labels, packed_labels)
        assert images.shape == (35, 3, *(view.size or (32, 32)))


def test_small_shards_are_decoded_into_memory_as_a_folder_is(folder: Path, shards: Path) -> None:
    of_folder, of_shards = loaded("folder", folder, 24), loaded("webdataset", shards, 24)
    one, other = of_folder.train, of_shards.train
    assert isinstance(one, Arrays) and isinstance(other, Arrays)
    assert (one.images == other.images).all() and of_folder.classes == of_shards.classes


CLASSES = ["Dr. No", "a b", "c\x85d", os.fsdecode(b"caf\xe9"), "'", "日本"]
WITHOUT_EXTENSION = ["Dr. No", "x", "x."]
EXTENSIONS = [".json", ".txt", ".cls", ".CLS", ".idx", ".npy", ".gz", ".tar", ".ñ", ".jpg~", ".a b"]
OF_IMAGES = ["a.b.c.JPG", "_.png", " y.png", "jpg.jpg", "\u2028.png", "it's.png", "100%.png"]
ODD = ["two\nlines.p\nng", "tab.\tpng", os.fsdecode(b"caf\xe9.caf\xe9"), f"x.{'long' * 50}"]
NAMES = [*WITHOUT_EXTENSION, *(f"x{extension}" for extension in EXTENSIONS), *OF_IMAGES, *ODD]


@pytest.fixture(scope="module")
def any_names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose classes and files have names of all kinds, and its shards."""
    root = tmp_path_factory.mktemp("names")
    for number, name in enumerate(NAMES * 2):
        place = root / "folder" / "train" / CLASSES[number % len(CLASSES)]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / name, "PNG")
    shutil.copytree(root / "folder" / "train", root / "folder" / "test")
    pack(root / "folder", root / "shards", 9, ONE, lambda _: None)
    return root


@pytest.mark.parametrize("index", ["with an index", "without"])
def test_a_folder_of_any_names_packs_and_reads_back(
    any_names: Path, index: str, tmp_path: Path
) -> None:
    """The same images and labels in the same order."""
    shards = Path(shutil.copytree(any_names / "shards", tmp_path / "shards"))
    if index == "without":
        for file in shards.glob("*/*.idx"):
            file.unlink()
    of_folder = load(Data(name="folder", path=any_names / "folder"), ONE, 1)
    of_shards = load(Data(name="webdataset", path=shards), ONE, 1)
    assert of_folder.classes == of_shards.classes == tuple(sorted(CLASSES))
    for split in ("train", "test"):
        one, other = getattr(of_folder, split), getattr(of_shards, split)
        assert (one.images == other.images).all() and (one.labels == other.labels).all()


def test_members_have_plain_names_that_dalis_tool_finds(any_names: Path, tmp_path: Path) -> None:
    tars = sorted((any_names / "shards" / "train").glob("*.tar"))
    assert index_by_dali(tars[0], tmp_path) == tars[0].with_suffix(".idx").read_text().split()
    members = []
    for tar in tars:
        listed = subprocess.run(["tar", "-tf", tar], capture_output=True, text=True, check=True)
        members += listed.stdout.splitlines()
    assert all(re.fullmatch(r"\d{9}\.(jpg|png|cls)", name) for name in members)
    assert len(set(members)) == len(members) == 2 * 2 * len(NAMES)


def test_a_class_name_with_a_line_break_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "two\nlines").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / split / "two\nlines" / "0.png")
    message = r"the class 'two\\nlines' has a line break in its name: rename its folder$"
    with pytest.raises(UserError, match=message):
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


def test_packing_reports_what_it_leaves_out(folder: Path, tmp_path: Path) -> None:
    copy, lines = Path(shutil.copytree(folder, tmp_path / "folder")), list[str]()
    link = copy / "test" / "n00000002" / "x.png"
    link.symlink_to("/nowhere")
    pack(copy, tmp_path / "shards", 100, ONE, lines.append)
    assert lines[0] == f"1 entry in {copy}/test is left out: 1 broken link ({link})"
    assert len(lines) == 3


def test_grey_and_cmyk_images_have_pillows_colours(folder: Path) -> None:
    """Pillow converts CMYK without a colour profile, too."""
    data = load(Data(name="folder", path=folder, image_size=((0, 16),)), ONE, 1)
    files = folder_files(folder)[0]["train"]
    kinds = set()
    for sample, path in enumerate(files.paths):
        with Image.open(path) as image:
            kinds.add(image.mode)
            theirs = np.asarray(image.convert("RGB")).reshape(-1, 3).mean(0)
        ours = data.train.images[sample].reshape(-1, 3).mean(0)  # type: ignore[union-attr]
        assert np.abs(ours - theirs).max() < 25, (path, ours, theirs)
    assert kinds == {"RGB", "L", "CMYK"}


def copied(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def test_wrong_shards_are_named(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no .tar files in .*swap-hpc pack makes them"):
        find_shards(tmp_path)
    copy = copied(shards, tmp_path)
    index = copy / "train" / "000000.idx"
    index.write_text("v1.2 1\njpeg 512\n")
    not_an_index = "000000.idx is not a DALI index: make it again with wds2idx"
    with pytest.raises(UserError, match=not_an_index):
        find_shards(copy / "train")
    index.write_text("v1.2 1\njpeg 512 7 a.jpeg\n")
    with pytest.raises(UserError, match=r"the sample a.jpeg needs one image and one .cls file"):
        find_shards(copy / "train")
    (copy / "classes.txt").write_text("one\n")
    shutil.copy(shards / "train" / "000000.idx", index)
    with pytest.raises(UserError, match="there is a class 6, but .*classes.txt names 1, counted"):
        load(Data(name="webdataset", path=copy), ONE, 1)


def test_a_damaged_image_in_a_shard_is_named(shards: Path, tmp_path: Path) -> None:
    copy = copied(shards, tmp_path)
    found = find_shards(copy / "train")
    tar, begin, size = Path(found.tars[found.tar[4]]), found.offset[4], found.size[4]
    content = bytearray(tar.read_bytes())
    content[begin : begin + size] = bytes(size)
    tar.write_bytes(content)
    message = rf"cannot decode the image at byte {begin} of {tar} \(not an image"
    with pytest.raises(UserError, match=message):
        load(Data(name="webdataset", path=copy, image_size=((0, 8),)), ONE, 1)


def test_a_shard_that_is_cut_off_is_named_and_no_image_blamed(shards: Path, tmp_path: Path) -> None:
    copy = copied(shards, tmp_path)
    found = find_shards(copy / "train")
    tar = Path(found.tars[-1])
    last_image = int(found.offset[found.tar == len(found.tars) - 1].max())
    tar.write_bytes(tar.read_bytes()[: last_image + 10])
    data = loaded("webdataset", copy, 8, memory_gib=0)
    number = len(data.train)
    pick = Picks(np.arange(number), np.full((number, 5), 0.5, np.float32))
    view = loader.View(Augment())
    with pytest.raises(RunError, match=rf"{tar} is shorter than its index says"):
        list(loader.batches(data, data.train, iter([pick]), view, number, tiny.CPU))


def test_shards_that_tar_made_of_folders_are_read(folder: Path, tmp_path: Path) -> None:
    """Names with `./`, folders with dots, no index, and labels only in `.cls` files."""
    train = folder_files(folder)[0]["train"]
    for i in range(8):
        place = tmp_path / "all" / f"v1.{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(train.paths[i], place / f"{i}.input.jpg")
        (place / f"{i}.cls").write_text(str(train.labels[i]))
    split = tmp_path / "train"
    split.mkdir()
    whole_folder = ("-C", str(tmp_path / "all"), ".")
    tar = ("tar", "--sort=name", "-cf", str(split / "a.tar"), *whole_folder)
    subprocess.run(tar, check=True)
    (split / "a.idx").touch()  # an empty index is ignored
    found = find_shards(split)
    read = sorted(found.read(i).tobytes() for i in range(8))
    assert read == sorted(Path(path).read_bytes() for path in train.paths[:8])
    shutil.copy(split / "a.tar", split / "b.tar")
    with pytest.raises(UserError, match="hold the sample ./v1.0/0 twice"):
        find_shards(split)


def test_another_packing_into_the_same_folder_is_refused(
    folder: Path, shards: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    other = Path(shutil.copytree(folder, tmp_path / "folder"))

    def refused(source: Path, samples_per_shard: int, message: str) -> None:
        with pytest.raises(UserError, match=message):
            pack(source, copy, samples_per_shard, ONE, lambda _: None)

    refused(folder, 9, "holds shards of other images, or of another --samples-per-shard")
    next((other / "train").glob("*/*")).unlink()
    refused(other, 10, "choose another folder, or remove it")
    (copy / "packing.json").unlink()
    refused(folder, 10, "holds shards of other images")


def test_labels_of_another_number_of_samples_are_refused(shards: Path, tmp_path: Path) -> None:
    copy = copied(shards, tmp_path)
    np.save(copy / "train" / LABELS, np.zeros(3, np.int64))
    message = "labels.npy has 3 labels, the .tar files hold 35 samples: pack again"
    with pytest.raises(UserError, match=message):
        find_shards(copy / "train")
