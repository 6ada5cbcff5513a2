"""Odd names and variables of users' systems; each start of the command tries several of them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from launch import settings, swap_hpc
from PIL import Image

LATIN = os.fsdecode(b"caf\xe9")
# A locale that has only ASCII.
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of two classes, with 8 training and 4 test images, a broken link and a pipe.

    The second image of each class lies in a folder inside the class.
    """
    root = tmp_path / "it's data"
    for split, count in (("train", 4), ("test", 2)):
        for label, name in enumerate((LATIN, "Dr. No")):
            for i in range(count):
                file = root / split / name / ("more" if i == 1 else "") / f"{i}.{name}"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8, 3), 100 * label + i, np.uint8)).save(file, "PNG")
    (root / "train" / LATIN / "x.png").symlink_to("/nowhere")
    os.mkfifo(root / "train" / LATIN / "pipe")
    return root


def test_a_run_on_odd_names(images: Path, tmp_path: Path) -> None:
    fields = settings(
        "data.name=folder",
        "model.width=4",
        "large_batch.epochs=1",
        "large_batch.batch_size=4",
        "refine.epochs=0",
        "refine.batch_size=4",
        "batchnorm.batch_size=4",
    )
    paths = ("--data", "it's data", "--out", "ö ut")
    done = swap_hpc("train", "digits", *fields, *paths, cwd=tmp_path)
    assert done.code == 0 and "8 training and 4 test images" in done.stdout, done.stderr
    facts = (tmp_path / "ö ut" / "environment.json").read_bytes()
    assert facts.isascii() and json.loads(facts)["data"]["classes"] == ["Dr. No", LATIN]


def test_packing_odd_names_where_the_terminal_has_only_ascii(images: Path, tmp_path: Path) -> None:
    done = swap_hpc("pack", "it's data", LATIN, cwd=tmp_path, variables=PLAIN)
    assert done.code == 0, done.stderr
    assert min(path.name for path in (tmp_path / LATIN).iterdir()) == "classes.txt"
    first = done.stdout.splitlines()[0]
    assert first.startswith("2 entries in it's data/train are left out: ")
    assert "1 broken link (it's data/train/caf\\udce9/x.png)" in first
    assert "1 special file (it's data/train/caf\\udce9/pipe)" in first
    assert (tmp_path / LATIN / "classes.txt").read_bytes() == b"Dr. No\ncaf\xe9\n"


@pytest.mark.parametrize("option", ["--data", "--out"])
def test_a_path_that_a_recipe_cannot_hold_gets_one_line(option: str, tmp_path: Path) -> None:
    done = swap_hpc("train", "digits", option, LATIN, cwd=tmp_path)
    assert done.code == 2 and len(done.ours) == 1, done.stderr
    assert r"caf\udce9 is not UTF-8" in done.ours[0]
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_a_number_of_threads_that_is_none_gets_one_line() -> None:
    done = swap_hpc("doctor", ranks=2, variables={"OMP_NUM_THREADS": "many"})
    assert done.code == 2 and len(done.ours) == 1, done.stderr
    wrong = "OMP_NUM_THREADS=many is no number of threads"
    assert done.ours[0] == f"swap-hpc: {wrong}: export OMP_NUM_THREADS=1, say, or unset it"
