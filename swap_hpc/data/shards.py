"""WebDataset shards: tar files of images and labels, each with DALI's index file beside it, written and found again."""

import io
import os
import re
import resource
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np

from swap_hpc.data.splits import Files, Shards
from swap_hpc.errors import RunError, UserError

INDEX = "v1.2"  # the version of DALI's index files (wds2idx) that is written; older ones name the same places
NOT_IMAGES = ("cls", "txt", "json")
IMAGES = re.compile(
    "bmp|dib|gif|j2k|jp2|jpc|jpe|jpeg|jpf|jpg|jpx|pbm|pgm|png|pnm|ppm|tif|tiff|webp"
)  # extensions
CLASSES = "classes.txt"  # beside the splits' folders: the classes' names, one on a line
LABELS = "labels.npy"  # beside a split's tar files: (N,) int64, in the order of the samples' keys

Component = tuple[str, int, int, str]  # extension, offset and size in bytes, name in the tar file


def write_shard(files: Files, samples: Sequence[int], tar: Path) -> list[list[Component]]:
    """Writes images and labels (`.cls`) of `samples` into a tar file, alike every time. Returns what its index holds.

    A sample's key is its number, so that sorting by key gives back the order of `files`. An image of another extension than `IMAGES`
    is stored as a .jpg, since its own may mean something else to a reader, or not fit in an index: what it is, its first bytes tell.
    Raises OSError; RunError for an image that cannot be read.
    """
    index: list[list[Component]] = []
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            path = Path(files.paths[sample])
            extension = path.suffix.lstrip(".").lower()
            parts = {
                extension if IMAGES.fullmatch(extension) else "jpg": _content(path),
                "cls": str(files.labels[sample]).encode(),
            }
            index.append(
                [
                    _add(archive, f"{sample:09d}", extension, content)
                    for extension, content in parts.items()
                ]
            )
    return index


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None


def _add(archive: tarfile.TarFile, key: str, extension: str, content: bytes) -> Component:
    member = tarfile.TarInfo(f"{key}.{extension}")
    member.size = len(content)
    begin = archive.offset + tarfile.BLOCKSIZE  # a header is one block
    archive.addfile(member, io.BytesIO(content))
    return extension, begin, len(content), member.name


def classes_text(classes: Sequence[str]) -> bytes:
    """The classes' names as they are on the disk, one on a line. Raises UserError for a name of several lines."""
    if several := next((name for name in classes if re.search("[\r\n]", name)), None):
        raise UserError(f"the class {several!r} has a line break in its name: rename its folder")
    return os.fsencode("".join(f"{name}\n" for name in classes))


def read_classes(file: Path) -> tuple[str, ...]:
    """What `classes_text` wrote."""
    text = os.fsdecode(file.read_bytes()).replace("\r\n", "\n")
    return tuple(text.removesuffix("\n").split("\n"))


def index_text(index: Sequence[Sequence[Component]]) -> str:
    """An index as DALI's `wds2idx` writes it."""
    return (
        "\n".join(
            [
                f"{INDEX} {len(index)}",
                *(" ".join(f"{e} {o} {s} {n}" for e, o, s, n in sample) for sample in index),
            ]
        )
        + "\n"
    )


def find_shards(split: Path) -> Shards:
    """The samples in the tar files of a folder, in the order of their keys. Raises UserError."""
    tars = sorted(split.glob("*.tar"))
    if not tars:
        raise UserError(
            f"no .tar files in {split}: swap-hpc pack makes them from a folder of images"
        )
    keys, places, labelled = [], [], []
    for number, tar in enumerate(tars):
        for sample in _index_of(tar):
            images = [part for part in sample if part[0] not in NOT_IMAGES]
            label = next((part for part in sample if part[0] == "cls"), None)
            if len(images) != 1 or label is None:
                raise UserError(
                    f"{tar}: the sample {sample[0][3]} needs one image and one .cls file with its class's number"
                )
            extension, offset, size, name = images[0]
            keys.append(name.removesuffix(f".{extension}"))
            places.append((number, offset, size))
            labelled.append((number, label[1], label[2]))
    if not keys:
        raise UserError(f"{split}: no sample in its {len(tars)} .tar files")
    order = np.argsort(np.array(keys), kind="stable")
    twice = next((keys[a] for a, b in pairwise(order) if keys[a] == keys[b]), None)
    if twice:
        raise UserError(
            f"{split}: its .tar files hold the sample {twice} twice: are shards of two packings in it?"
        )
    tar_of, offset_of, size_of = np.array(places, dtype=np.int64)[order].T
    found = Shards(
        tuple(map(str, tars)),
        tar_of.astype(np.int32),
        offset_of,
        size_of,
        np.zeros(len(keys), np.int64),
    )
    labels = _labels(split, found, np.array(labelled, dtype=np.int64)[order])
    if labels.min() < 0:
        raise UserError(f"{split}: a class is {labels.min()}: classes count from 0")
    return Shards(found.tars, found.tar, found.offset, found.size, labels)


def _labels(split: Path, shards: Shards, places: np.ndarray) -> np.ndarray:
    if (split / LABELS).is_file():
        labels = np.load(split / LABELS)
        if len(labels) != len(shards):
            raise UserError(
                f"{split}: {LABELS} has {len(labels)} labels, the .tar files hold {len(shards)} samples: pack again"
            )
        return labels
    numbers, offsets, sizes = places.T
    texts = Shards(shards.tars, numbers.astype(np.int32), offsets, sizes, shards.labels)
    try:
        return np.array([int(texts.read(i).tobytes()) for i in range(len(texts))], dtype=np.int64)
    except (ValueError, RunError) as error:
        raise UserError(
            f"{split}: a .cls file holds no number, or cannot be read ({error})"
        ) from None


def _index_of(tar: Path) -> Iterator[list[Component]]:
    """A sample's components, sample by sample: from the index beside the tar file, else from the headers in it. Raises UserError."""
    file = tar.with_suffix(".idx")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    if not lines or not lines[0].startswith(INDEX):  # older ones do not tell the names
        yield from _scanned(tar)
        return
    for line in lines[1:]:
        fields = line.split(" ")
        try:
            yield [
                (e, int(offset), int(size), name)
                for e, offset, size, name in zip(*[iter(fields)] * 4, strict=True)
            ]
        except ValueError:
            raise UserError(
                f"{file} is not an index of DALI's: make it again with wds2idx, or remove it"
            ) from None


def _scanned(tar: Path) -> Iterator[list[Component]]:
    try:
        with tarfile.open(tar, "r:") as archive:
            members = [
                (_split(m.name)[1], m.offset_data, m.size, m.name) for m in archive if m.isfile()
            ]
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"cannot read {tar}: {error}") from None
    for _, parts in groupby(members, lambda part: _split(part[3])[0]):
        yield list(parts)


def _split(name: str) -> tuple[str, str]:
    """Key and extension of a member: at the first dot of its name, whatever dots its folders have."""
    folder, slash, file = name.rpartition("/")
    key, _, extension = file.partition(".")
    return f"{folder}{slash}{key}", extension


def allow_open_files(number: int) -> None:
    """Raises this process's limit, where it is too low for that many more open files. UserError where the system does not allow it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + number + 256
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UserError(
            f"{number} shards stay open, but a process may open {hard} files: ulimit -Hn, or pack with more --samples-per-shard"
        )
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
