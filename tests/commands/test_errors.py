"""Bad input gets one line with a hint and exit code 2, before any training."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from launch import BIN, Finished, settings, swap_hpc
from PIL import Image

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A correct folder of 2 classes, 6 training and 2 test images each, for tests to damage."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 6), ("test", 2)):
        for label, name in enumerate("ab"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((8, 8, 3), 100 * label + i, np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


FOLDER = settings(
    "data.name=folder",
    "large_batch.batch_size=4",
    "refine.batch_size=4",
    "batchnorm.batch_size=4",
)

# Arguments of `train`, ranks, and a part of the message.
CASES: dict[str, tuple[tuple[str, ...], int | None, str]] = {
    "unknown recipe": (
        ("digit",),
        None,
        "no recipe 'digit': neither a file nor one of cifar10-cpu",
    ),
    "unknown field": (
        ("digits", "--set", "refine.epoch=1"),
        None,
        "unknown field refine.epoch; valid here: batch_size, epochs",
    ),
    "unknown option": (("digits", "--epochs", "3"), None, "No such option"),
    "a model that refuses": (
        ("digits", "--set", "model.width=0"),
        2,
        "model resnet9 refuses its arguments: width = 0",
    ),
    "no recipe": ((), None, "Missing argument 'RECIPE'"),
    "unknown recipe on 3 ranks": (("digit",), 3, "no recipe 'digit'"),
    "unknown option on 3 ranks": (("digits", "--epochs", "3"), 3, "No such option"),
    "ranks and groups": (
        ("digits",),
        3,
        "3 ranks cannot share 4 groups: start a multiple or a divisor of the groups (1, 2, 4, 8",
    ),
    "a batch that does not divide": (
        ("digits", "--set", "large_batch.batch_size=255"),
        2,
        "--set large_batch.batch_size=254 or 256",
    ),
    "fewer samples than a batch": (
        ("digits", "--set", "large_batch.batch_size=2048"),
        None,
        "but there are 1198 training samples",
    ),
    "missing folder": (
        ("digits", *FOLDER, "--data", "/nowhere"),
        2,
        "no folder /nowhere/train: point --data at a folder",
    ),
    "unknown model": (("digits", "--set", "model.name=resnet10"), 2, "unknown model 'resnet10'"),
    "a rate that is no schedule": (
        ("digits", "--set", "refine.learning_rate=[0.1, 0.0]"),
        2,
        "refine.learning_rate: needs a number, or pairs",
    ),
    "a bracket too few": (
        ("digits", "--set", "refine.learning_rate=[[0, 0.1], [4, 0.0]"),
        2,
        "needs a number, or pairs from an epoch on: [[0, 0.1]",
    ),
    "an argument that is no number": (
        ("digits", "--set", "model.width=nan"),
        2,
        "model: nan is not a finite number",
    ),
    "no GPU": (
        ("digits", "--set", "device=cuda"),
        2,
        'device = "cuda", but torch sees no GPU on this host',
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_line(case: str, tmp_path: Path) -> None:
    arguments, ranks, message = CASES[case]
    if case == "no GPU" and _gpus():
        pytest.skip("this host has a GPU")
    done = swap_hpc("train", *arguments, "--out", tmp_path / "out", ranks=ranks)
    fails_with_one_line(done, 2, message)
    assert not (tmp_path / "out").exists()


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def fails_with_one_line(done: Finished, code: int, message: str) -> None:
    """Assert the exit code, and that the only line of ours holds the message."""
    assert done.code == code and len(done.ours) == 1, done.stderr
    assert message in done.ours[0], done.stderr
    assert "Traceback" not in done.stderr


def train_failing(model: str, out: Path, *fields: str, ranks: int) -> Finished:
    """Train a model of failing.py."""
    options = settings(f"model.name=failing:{model}", *fields)
    variables = {"PYTHONPATH": str(TESTS)}
    return swap_hpc("train", "digits", *options, "--out", out, ranks=ranks, variables=variables)


def _other_classes(train: Path) -> None:
    shutil.rmtree(train / "b")


def _empty_class(train: Path) -> None:
    shutil.rmtree(train / "b")
    (train / "b").mkdir()


def _empty_folder(train: Path) -> None:
    shutil.rmtree(train)
    train.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_other_classes, "train and test have different classes (b)"),
        (_empty_class, "train/b is empty: put the class's images there"),
        (_empty_folder, "train is empty: it needs one folder of images per class"),
    ],
)
def test_a_wrong_folder_gets_one_line(
    damage: Callable[[Path], None], message: str, images: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(images, tmp_path / "images")
    damage(root / "train")
    done = swap_hpc("train", "digits", *FOLDER, "--data", root, "--out", tmp_path / "out", ranks=2)
    fails_with_one_line(done, 2, message)
    assert not (tmp_path / "out").exists()


@contextmanager
def truncated(file: Path) -> Iterator[None]:
    """Leave only the first 40 bytes of a file for a while."""
    whole = file.read_bytes()
    file.write_bytes(whole[:40])
    try:
        yield
    finally:
        file.write_bytes(whole)


def test_an_unreadable_image_is_named_before_training(images: Path) -> None:
    bad = images / "train" / "b" / "5.png"
    out = images / "out"
    with truncated(bad):
        done = swap_hpc("train", "digits", *FOLDER, "--data", images, "--out", out, ranks=2)
    fails_with_one_line(done, 2, f"cannot decode the image {bad}")


def test_an_unreadable_image_in_streamed_data_ends_the_run_when_it_is_met(
    images: Path, tmp_path: Path
) -> None:
    bad = images / "train" / "a" / "3.png"
    streamed = (*FOLDER, *settings("data.memory_gib=0", "data.image_size=8"))
    out = tmp_path / "out"
    with truncated(bad):
        done = swap_hpc("train", "digits", *streamed, "--data", images, "--out", out, ranks=2)
    fails_with_one_line(done, 3, f"cannot decode the image {bad}")


def test_a_rank_that_raises_ends_all_ranks_with_its_traceback_once(tmp_path: Path) -> None:
    fields = ("groups=3", "large_batch.batch_size=240")
    done = train_failing("raises_on_rank_1", tmp_path / "out", *fields, ranks=3)
    assert done.code == 3
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert "/typer/" not in done.stderr
    assert done.stderr.count("ArithmeticError: rank 1 cannot go on") == 1


def test_a_rank_whose_gpu_is_full_ends_all_with_one_line(tmp_path: Path) -> None:
    """It ends as wrong input, so that a batch script does not start it again."""
    done = train_failing("fills_the_memory_on_rank_1", tmp_path / "out", "groups=2", ranks=2)
    error = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."
    fails_with_one_line(done, 2, f"swap-hpc: the GPU's memory is full ({error}):")


def test_a_loss_that_is_not_finite_is_reported_once(tmp_path: Path) -> None:
    """One of the two ranks of one of the two groups reports it, and the last good model stays."""
    rate = settings("groups=2", "large_batch.epochs=1", "refine.learning_rate=1e30")
    done = swap_hpc("train", "digits", *rate, "--out", tmp_path, ranks=4)
    assert done.code == 3 and len(done.ours) == 1, done.stderr
    assert "in refine of group" in done.ours[0]
    assert "at a learning rate of 1e+30: lower the rate" in done.ours[0]
    assert (tmp_path / "large_batch.safetensors").exists()
    assert not (tmp_path / "result.json").exists()
    assert list((tmp_path / "checkpoints").glob("large_batch-00001-*.safetensors"))


def test_wrong_input_that_one_rank_alone_meets_ends_all(tmp_path: Path) -> None:
    done = train_failing("refuses_on_rank_1", tmp_path / "out", ranks=2)
    message = "model failing:refuses_on_rank_1 refuses its arguments: not on this rank"
    assert done.code == 2 and done.ours == [f"swap-hpc: {message}"]


@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        (
            "has_two_classes",
            2,
            "the model failing:has_two_classes returned a tensor [128, 2] float32: "
            "logits [128, 10] are needed",
        ),
        (
            "missing",
            2,
            "the model failing:missing: failing has no missing; "
            "it has raises_on_rank_1, has_two_classes, leaves, refuses",
        ),
        ("leaves", 3, "SystemExit: 0"),
        (
            "writes_into_a_broken_pipe",
            2,
            "first step: BrokenPipeError: [Errno 32] a pipe of the model's own (failing.py, line",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_named(
    model: str, code: int, message: str, tmp_path: Path
) -> None:
    done = train_failing(model, tmp_path / "out", ranks=2)
    assert done.code == code and message in done.stderr, done.stderr
    if code == 2:
        fails_with_one_line(done, code, message)


def test_a_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    done = swap_hpc("train", "digits", "--out", tmp_path / "out")
    message = f"--out {tmp_path}/out is a file: name a folder"
    assert done.code == 2 and done.ours == [f"swap-hpc: {message}"]


def test_another_recipe_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    digits = (TESTS.parent / "swap_hpc" / "recipe" / "digits.toml").read_text()
    (tmp_path / "recipe.toml").write_text(digits + "\n[evaluate]\nevery = 3\n")
    (tmp_path / "environment.json").write_text('{"ranks": [{}]}')  # what tells a run's folder
    (tmp_path / "large_batch.safetensors").touch()
    done = swap_hpc("train", "digits", "--out", tmp_path)
    assert done.code == 2
    differ = "holds a run of another recipe (evaluate.every, name differ): choose another --out"
    assert differ in done.ours[0]


def test_a_run_that_diverged_before_its_first_save_does_not_lock_its_folder(tmp_path: Path) -> None:
    line = ("train", "digits", "--out", tmp_path)
    small = settings("groups=1", "model.width=4", "large_batch.epochs=2", "refine.epochs=0")
    diverged = swap_hpc(*line, *small, "--set", "large_batch.learning_rate=1e30")
    assert diverged.code == 3 and (tmp_path / "diverged.json").exists(), diverged.stderr
    mended = swap_hpc(*line, *small)
    assert mended.code == 0, mended.stderr
    assert "(large_batch.learning_rate differ) that had saved nothing: this run" in mended.stdout
    assert not (tmp_path / "diverged.json").exists()


@pytest.mark.parametrize(
    "line",
    [("recipes",), ("bench",), ("train", "digits", "--set", "model.width=4", "--out", "{out}")],
    ids=str,
)
def test_a_reader_that_goes_away_gets_no_traceback(line: tuple[str, ...], tmp_path: Path) -> None:
    """`| head` closes the pipe like this."""
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [word.format(out=tmp_path / "out") for word in line]
    program = [str(BIN / "swap-hpc"), *arguments]
    done = subprocess.run(program, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 1 and "BrokenPipeError" not in done.stderr, done.stderr
