"""Data sets as they are loaded, and the messages about wrong folders."""

import functools
import hashlib
import io
import pickle
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tiny
import torchvision
from PIL import Image

from swap_hpc.data import download, load, loader
from swap_hpc.data.pack import pack
from swap_hpc.data.sampling import evaluation_picks
from swap_hpc.data.sources import SOURCES
from swap_hpc.data.splits import Arrays, Files
from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.inputs import Data
from swap_hpc.recipe.values import DataName


def loaded(**fields: Any) -> Any:
    return load(Data(**fields), Team.alone(), threads=1)


def make_folder(
    root: Path,
    sizes: tuple[tuple[int, int], ...] = ((12, 10),),
    formats: tuple[str, ...] = ("png", "jpg", "bmp", "webp"),
) -> Path:
    """Make two classes with four training and two test images each, of nearly one colour.

    Sizes, (width, height), and formats take turns.
    """
    generator = np.random.default_rng(0)
    size, form = cycle(sizes), cycle(formats)
    for split, images in (("train", 4), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(images):
                width, height = next(size)
                noise = generator.integers(0, 9, (height, width, 3), dtype=np.uint8)
                pixels = np.uint8(60 + 120 * label) + noise
                Image.fromarray(pixels).save(folder / f"{i}.{next(form)}")
    return root


def test_digits() -> None:
    data = loaded(name="digits")
    assert len(data.train) == 1198 and len(data.test) == 599
    assert data.channels == 1 and data.image_size == (8, 8)
    assert data.train.images.max() == 240 and set(data.test.labels) == set(range(10))
    assert 0 < data.mean[0] < 240
    assert data.std[0] == pytest.approx(data.train.images.std(), rel=1e-6)


def test_synthetic_has_the_stated_size() -> None:
    data = loaded(name="synthetic", samples=50, classes=5, image_size=16)
    assert data.train.images.shape == (50, 16, 16, 3)
    assert len(data.test) == 12 and len(data.classes) == 5


def test_a_folder_is_decoded_into_memory_whatever_the_formats(tmp_path: Path) -> None:
    data = loaded(name="folder", path=make_folder(tmp_path))
    assert isinstance(data.train, Arrays)
    assert data.train.images.shape == (8, 10, 12, 3) and data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4
    assert np.abs(data.train.images[:4].mean() - 64) < 3
    assert np.abs(data.train.images[4:].mean() - 184) < 3


def test_images_of_several_sizes_are_resized_where_a_size_is_given(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, sizes=((12, 10), (30, 20), (9, 21)))
    message = (
        r"the images differ in size \(the first one is 12x10, .*1.jpg is 30x20\): "
        "set data.image_size"
    )
    with pytest.raises(UserError, match=message):
        loaded(name="folder", path=folder)
    assert loaded(name="folder", path=folder, image_size=8).train.images.shape == (8, 8, 8, 3)


def test_a_folder_larger_than_its_budget_is_streamed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    data = loaded(name="folder", path=folder, memory_gib=0, image_size=8)
    assert isinstance(data.train, Files) and len(data.train) == 8 and data.image_size == (8, 8)
    with pytest.raises(UserError, match="set data.image_size"):
        loaded(name="folder", path=folder, memory_gib=0)


def remove_test(folder: Path) -> None:
    (folder / "test").rename(folder / "tests")


def empty_class(folder: Path) -> None:
    for path in (folder / "train" / "dog").iterdir():
        path.unlink()


def other_class(folder: Path) -> None:
    (folder / "test" / "dog").rename(folder / "test" / "wolf")


def damage(folder: Path) -> None:
    (folder / "train" / "cat" / "2.bmp").write_bytes(b"BM nothing")


def no_classes(folder: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / split / name).rename(folder / f"{split}-{name}")


def no_bytes(folder: Path) -> None:
    (folder / "test" / "dog" / "0.png").write_bytes(b"")


NO_TEST = "no folder .*/test: point --data at a folder with train/<class>/ and test/<class>/"
NO_IMAGE = r"\(not an image that DALI decodes, or damaged\): replace or remove"
WRONG = [
    (remove_test, NO_TEST),
    (empty_class, "train/dog is empty: put the class's images there"),
    (other_class, r"train and test have different classes \(dog, wolf\)"),
    (damage, rf"cannot decode the image .*/train/cat/2.bmp {NO_IMAGE}"),
    (no_classes, "train is empty: it needs one folder of images per class"),
    (no_bytes, r"cannot decode the image .*/test/dog/0.* \(the file is empty\)"),
]


@pytest.mark.parametrize(("harm", "message"), WRONG)
def test_the_message_about_a_wrong_folder_has_a_hint(
    harm: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path, formats=("png", "jpg", "bmp"))
    harm(folder)
    with pytest.raises(UserError, match=message) as error:
        loaded(name="folder", path=folder)
    assert "\n" not in str(error.value)


def gif() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (12, 10), (1, 2, 3)).save(content, "GIF")
    return content.getvalue()


def odd_webp() -> bytes:
    """Return a lossless image with EXIF whose chunk of pixels has an odd number of bytes."""
    exif = Image.Exif()
    exif[0x0112] = 1
    for seed in range(100):
        pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "WEBP", lossless=True, exif=exif)
        place = content.getvalue().index(b"VP8L") + 4
        if int.from_bytes(content.getvalue()[place : place + 4], "little") % 2:
            return content.getvalue()
    raise AssertionError("all even")


@dataclass(frozen=True)
class Valid:
    """A file that Pillow decodes and DALI refuses."""

    name: str  # of the format, in the message
    pillow: str  # of the format, for Pillow
    content: Callable[[], bytes]


# DALI decodes no GIF, and no WebP with metadata after a chunk of an odd size.
REFUSED = [Valid("GIF", "GIF", gif), Valid("WebP", "WEBP", odd_webp)]


@pytest.mark.parametrize("kind", ["memory", "streamed", "shards"])
@pytest.mark.parametrize("valid", REFUSED, ids=lambda valid: valid.name)
def test_an_image_that_pillow_decodes_is_not_called_damaged(
    valid: Valid, kind: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "images", formats=("png",))
    bad = folder / "train" / "dog" / "1.png"
    bad.write_bytes(valid.content())
    with Image.open(bad) as image:
        image.load()  # to its end
        assert image.format == valid.pillow
    where, path, name = str(bad), folder, "folder"
    if kind == "shards":
        path, name = tmp_path / "shards", "webdataset"
        pack(folder, path, 100, Team.alone(), lambda _: None)
        where = rf"at byte \d+ of {path}/train/000000.tar"
    message = (
        rf"^DALI does not decode this valid {valid.name} file \({where}\): "
        "convert it, for example to PNG$"
    )
    memory = 0 if kind == "streamed" else 1
    with pytest.raises((UserError, RunError), match=message):
        data = loaded(name=name, path=path, image_size=8, memory_gib=memory)
        picks = evaluation_picks(8, 3, 0, 1)
        list(loader.batches(data, data.train, picks, loader.View(None), 3, tiny.CPU))


@pytest.mark.parametrize("harm", ["cut", "header", "middle"])
def test_what_pillow_does_not_decode_either_is_damaged(harm: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, formats=("png",), sizes=((90, 80),))
    bad = folder / "train" / "dog" / "1.png"
    content = bad.read_bytes()
    harmed = {
        "cut": content[: len(content) // 2],
        "header": content[:20],
        "middle": content[:300] + bytes(200) + content[500:],
    }
    bad.write_bytes(harmed[harm])
    with pytest.raises(UserError, match=rf"^cannot decode the image {bad} {NO_IMAGE}"):
        loaded(name="folder", path=folder)


def test_a_folder_without_splits_is_split_by_test_every(tmp_path: Path) -> None:
    sizes = ((12, 10), (30, 20), (9, 21))
    folder = make_folder(tmp_path, sizes, formats=("png", "jpg", "bmp")) / "train"
    data = loaded(name="folder", path=folder, memory_gib=0, image_size=8, test_every=2)
    train, test = data.train, data.test
    assert isinstance(train, Files) and isinstance(test, Files)
    cats = sorted(map(str, (folder / "cat").iterdir()))
    dogs = sorted(map(str, (folder / "dog").iterdir()))
    assert data.classes == ("cat", "dog") and len(cats) == len(dogs) == 4
    assert test.paths == (*cats[::2], *dogs[::2])
    assert train.paths == (*cats[1::2], *dogs[1::2])
    assert test.labels.tolist() == train.labels.tolist() == [0, 0, 1, 1]


def test_a_folder_that_test_every_cannot_split_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, formats=("png",))

    def refused(path: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            loaded(name="folder", path=path, test_every=5)

    refused(folder, "has test and train, so it is split already: leave data.test_every out")
    (folder / "train").rename(folder / "Train")
    (folder / "test").rename(folder / "Valid")
    refused(folder, "has Train and Valid, so it is split already: .*, and call its folders train")
    shutil.rmtree(folder / "Valid")
    refused(folder, "/Train looks like a split, not like a class: point --data at .*/Train, or")
    (folder / "Train").rename(folder / "pets")
    refused(folder, "holds a single folder, pets: data.test_every needs one for each class")
    (folder / "pets").rename(folder / "train")
    (folder / "bus").mkdir()
    refused(folder, "/train looks like a split")
    for file in sorted((folder / "train").glob("*/*")):  # a vehicle
        file.rename(folder / "train" / f"{file.parent.name}-{file.name}")
    for name in ("cat", "dog"):
        (folder / "train" / name).rmdir()
    shutil.rmtree(folder / "bus")
    shutil.copytree(folder / "train", folder / "bus")
    assert loaded(name="folder", path=folder, test_every=5).classes == ("bus", "train")
    shutil.rmtree(folder)
    folder = make_folder(tmp_path, formats=("png",))
    for path in sorted((folder / "train" / "dog").iterdir())[1:]:
        path.unlink()
    one_image = "train/dog holds one image: it needs two, one to train and one to test on"
    refused(folder / "train", one_image)
    nowhere = "no folder .*/nowhere: point --data at a folder with <class>/$"
    refused(folder / "nowhere", nowhere)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*/nowhere/train: point --data at"):
        loaded(name="folder", path=tmp_path / "nowhere")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """Yield the address of a web server on this machine that serves the test's folder."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def make_cifar10(root: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve CIFAR-10's archive, with its layout and few images, to torchvision's download."""
    source = root / "source" / "cifar-10-batches-py"
    source.mkdir(parents=True)
    generator = np.random.default_rng(0)
    training = [f"data_batch_{i}" for i in range(1, 6)]
    sums = {}
    for name in (*training, "test_batch"):
        images = generator.integers(0, 255, (20, 3072), dtype=np.uint8)
        content = {"data": images, "labels": [i % 10 for i in range(20)]}
        (source / name).write_bytes(pickle.dumps(content))
        sums[name] = md5(source / name)
    (source / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    archive = root / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, "cifar-10-batches-py")
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "url", f"{address}/{archive.name}")
    monkeypatch.setattr(cifar, "tgz_md5", md5(archive))
    monkeypatch.setattr(cifar, "train_list", [[name, sums[name]] for name in training])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": md5(source / "batches.meta")})


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def test_cifar10_is_downloaded_verified_and_found_again(
    tmp_path: Path, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cifar10(tmp_path, served, monkeypatch)
    assert str(tmp_path / "data") in download("cifar10", tmp_path / "data")
    (tmp_path / "cifar-10-python.tar.gz").unlink()  # the server has nothing left to serve
    data = loaded(name="cifar10", path=tmp_path / "data")
    assert data.train.images.shape == (100, 32, 32, 3) and len(data.test) == 20
    assert data.classes == tuple("abcdefghij")
    (tmp_path / "data" / "cifar-10-batches-py" / "test_batch").write_bytes(b"damaged")
    (tmp_path / "data" / "cifar-10-python.tar.gz").unlink()
    message = "cifar10 is not in .* and could not be downloaded .*swap-hpc data cifar10"
    with pytest.raises(UserError, match=message):
        loaded(name="cifar10", path=tmp_path / "data")


def test_every_name_of_a_recipe_has_its_source() -> None:
    assert set(get_args(DataName)) == set(SOURCES)
