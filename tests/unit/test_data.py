"""Data sets: what is loaded, and what a wrong folder is answered with."""

import functools
import hashlib
import io
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torchvision
from PIL import Image

from swap_hpc.data import download, load, loader
from swap_hpc.data.pack import pack
from swap_hpc.data.sampling import evaluation_picks
from swap_hpc.data.splits import Arrays, Files
from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.schema import Data


def loaded(**fields: Any) -> Any:
    return load(Data(**fields), Team.alone(), threads=1)


def make_folder(
    root: Path,
    sizes: tuple[tuple[int, int], ...] = ((12, 10),),
    formats: tuple[str, ...] = ("png", "jpg", "bmp", "webp"),
) -> Path:
    """Two classes, four training and two test images each, of one colour."""
    generator = np.random.default_rng(0)
    count = 0
    for split, images in (("train", 4), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                width, height = sizes[count % len(sizes)]
                pixels = np.full(
                    (height, width, 3), 60 + 120 * label, np.uint8
                ) + generator.integers(0, 9, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(
                    root / split / name / f"{i}.{formats[count % len(formats)]}"
                )
                count += 1
    return root


def test_digits() -> None:
    data = loaded(name="digits")
    assert (len(data.train), len(data.test), data.channels, data.image_size) == (
        1198,
        599,
        1,
        (8, 8),
    )
    assert data.train.images.max() == 240 and set(data.test.labels) == set(range(10))
    assert 0 < data.mean[0] < 240 and data.std[0] == pytest.approx(
        data.train.images.std(), rel=1e-6
    )


def test_synthetic_has_the_stated_size() -> None:
    data = loaded(name="synthetic", samples=50, classes=5, image_size=16)
    assert (
        data.train.images.shape == (50, 16, 16, 3)
        and len(data.test) == 12
        and len(data.classes) == 5
    )


def test_a_folder_is_decoded_into_memory_whatever_the_formats(tmp_path: Path) -> None:
    data = loaded(name="folder", path=make_folder(tmp_path))
    assert (
        isinstance(data.train, Arrays)
        and data.train.images.shape == (8, 10, 12, 3)
        and data.classes == ("cat", "dog")
    )
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4
    assert (
        np.abs(data.train.images[:4].mean() - 64) < 3
        and np.abs(data.train.images[4:].mean() - 184) < 3
    )


def test_images_of_several_sizes_are_resized_where_a_size_is_given(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, sizes=((12, 10), (30, 20), (9, 21)))
    with pytest.raises(
        UserError,
        match=r"the images differ in size \(the first one is 12x10, .*1.jpg is 30x20\): set data.image_size",
    ):
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


WRONG = [
    (
        remove_test,
        "no folder .*/test: point --data at a folder with train/<class>/ and test/<class>/",
    ),
    (empty_class, "train/dog is empty: put the class's images there"),
    (other_class, r"train and test have different classes \(dog, wolf\)"),
    (
        damage,
        r"cannot decode the image .*/train/cat/2.bmp \(not an image that DALI decodes, or damaged\): replace or remove",
    ),
    (no_classes, "train is empty: it needs one folder of images per class"),
    (no_bytes, r"cannot decode the image .*/test/dog/0.* \(the file is empty\)"),
]


@pytest.mark.parametrize(("harm", "message"), WRONG)
def test_a_wrong_folder_is_answered_with_the_mend(
    harm: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path, formats=("png", "jpg", "bmp"))
    harm(folder)
    with pytest.raises(UserError, match=message) as error:
        loaded(name="folder", path=folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["memory", "streamed", "shards"])
@pytest.mark.parametrize("made", ["gif", "webp"])
def test_what_pillow_decodes_is_not_called_damaged(made: str, kind: str, tmp_path: Path) -> None:
    """DALI takes no GIF, and no WebP with metadata after a chunk of an odd size."""
    folder = make_folder(tmp_path / "images", formats=("png",))
    name, form, file = {"gif": ("GIF", "GIF", odd_gif), "webp": ("WebP", "WEBP", odd_webp)}[made]
    bad = folder / "train" / "dog" / "1.png"
    bad.write_bytes(file())
    with Image.open(bad) as image:
        image.load()  # to its end
        assert image.format == form
    where = rf"at byte \d+ of {tmp_path}/shards/train/000000.tar" if kind == "shards" else str(bad)
    if kind == "shards":
        pack(folder, tmp_path / "shards", 100, Team.alone(), lambda _: None)
    path, fields = (
        (tmp_path / "shards", {"name": "webdataset"})
        if kind == "shards"
        else (folder, {"name": "folder"})
    )
    with pytest.raises(
        (UserError, RunError),
        match=rf"^DALI does not decode this valid {name} file \({where}\): convert it, for example to PNG$",
    ):
        data = loaded(path=path, image_size=8, memory_gib=0 if kind == "streamed" else 1, **fields)
        list(
            loader.batches(
                data, data.train, evaluation_picks(8, 3, 0, 1), loader.View(None), 3, tiny.CPU
            )
        )


def odd_gif() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (12, 10), (1, 2, 3)).save(content, "GIF")
    return content.getvalue()


def odd_webp() -> bytes:
    """Lossless, with EXIF, and the chunk of pixels of an odd size."""
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
    with pytest.raises(
        UserError,
        match=rf"^cannot decode the image {bad} \(not an image that DALI decodes, or damaged\): replace or remove",
    ):
        loaded(name="folder", path=folder)


def test_a_folder_that_is_not_split_is_by_a_field(tmp_path: Path) -> None:
    folder = make_folder(
        tmp_path, formats=("png", "jpg", "bmp"), sizes=((12, 10), (30, 20), (9, 21))
    )
    whole, size = (
        loaded(name="folder", path=folder / "train", memory_gib=0, image_size=8, test_every=2),
        4,
    )
    train, test = whole.train, whole.test
    assert isinstance(train, Files) and isinstance(test, Files)
    every = {
        label: sorted((folder / "train" / name).iterdir())
        for label, name in enumerate(whole.classes)
    }
    assert all(len(files) == size for files in every.values())
    assert test.paths == tuple(
        str(path) for files in every.values() for path in files[::2]
    ) and test.labels.tolist() == [0, 0, 1, 1]
    assert train.paths == tuple(
        str(path) for files in every.values() for path in files[1::2]
    ) and train.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(
        UserError, match=r"has train and test, so it is split already: leave data.test_every out"
    ):
        loaded(name="folder", path=folder, test_every=5)
    for path in every[1][1:]:
        path.unlink()
    with pytest.raises(
        UserError, match=r"train/dog holds one image: it needs two, one to train and one to test on"
    ):
        loaded(name="folder", path=folder / "train", test_every=5)
    with pytest.raises(
        UserError, match=r"no folder .*/nowhere: point --data at a folder with <class>/$"
    ):
        loaded(name="folder", path=folder / "nowhere", test_every=5)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*/nowhere/train: point --data at"):
        loaded(name="folder", path=tmp_path / "nowhere")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a web server on this machine that serves the test's folder."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def make_cifar10(root: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10's archive with its own layout and few images, where torchvision's download finds it."""
    source = root / "source" / "cifar-10-batches-py"
    source.mkdir(parents=True)
    generator = np.random.default_rng(0)
    sums = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        content = {
            "data": generator.integers(0, 255, (20, 3072), dtype=np.uint8),
            "labels": [i % 10 for i in range(20)],
        }
        (source / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((source / name).read_bytes()).hexdigest()
    (source / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    archive = root / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, "cifar-10-batches-py")
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "url", f"{address}/{archive.name}")
    monkeypatch.setattr(cifar, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(cifar, "train_list", [[n, s] for n, s in sums.items() if n != "test_batch"])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        cifar,
        "meta",
        cifar.meta | {"md5": hashlib.md5((source / "batches.meta").read_bytes()).hexdigest()},
    )


def test_cifar10_is_downloaded_verified_and_found_again(
    tmp_path: Path, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cifar10(tmp_path, served, monkeypatch)
    assert str(tmp_path / "data") in download("cifar10", tmp_path / "data")
    (tmp_path / "cifar-10-python.tar.gz").unlink()  # from here on there is no network
    data = loaded(name="cifar10", path=tmp_path / "data")
    assert (
        data.train.images.shape == (100, 32, 32, 3)
        and len(data.test) == 20
        and data.classes == tuple("abcdefghij")
    )
    (tmp_path / "data" / "cifar-10-batches-py" / "test_batch").write_bytes(b"damaged")
    (tmp_path / "data" / "cifar-10-python.tar.gz").unlink()
    with pytest.raises(
        UserError, match="cifar10 is not in .* and could not be downloaded .*swap-hpc data cifar10"
    ):
        loaded(name="cifar10", path=tmp_path / "data")
