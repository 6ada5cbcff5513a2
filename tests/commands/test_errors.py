"""Bad input: one line from our program, the mend in it, exit code 2, within seconds, before any training."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from launch import BIN, swap_hpc
from PIL import Image

TESTS = Path(__file__).parents[1]
SECONDS = 30  # generous: most of it is importing torch on a busy machine


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder of 2 classes, 6 training and 2 test images each, to be harmed by copies."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 6), ("test", 2)):
        for label, name in enumerate("ab"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((8, 8, 3), 100 * label + i, np.uint8)).save(
                    root / split / name / f"{i}.png"
                )
    return root


SMALL = [
    word
    for phase in ("large_batch", "refine", "batchnorm")
    for word in ("--set", f"{phase}.batch_size=4")
]
FOLDER = ("--set", "data.name=folder", *SMALL)

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
    assert done.code == 2, done.stderr
    assert len(done.ours) == 1 and message in done.ours[0], done.stderr
    assert "Traceback" not in done.stderr and done.seconds < SECONDS
    assert not (tmp_path / "out").exists()


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _other_classes(train: Path) -> None:
    shutil.rmtree(train / "b")


def _empty_class(train: Path) -> None:
    shutil.rmtree(train / "b")
    (train / "b").mkdir()


def _empty_folder(train: Path) -> None:
    shutil.rmtree(train)
    train.mkdir()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_other_classes, "train and test have different classes (b)"),
        (_empty_class, "train/b is empty: put the class's images there"),
        (_empty_folder, "train is empty: it needs one folder of images per class"),
    ],
)
def test_a_wrong_folder_gets_one_line(
    harm: Callable[[Path], None], message: str, images: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(images, tmp_path / "images")
    harm(root / "train")
    done = swap_hpc("train", "digits", *FOLDER, "--data", root, "--out", tmp_path / "out", ranks=2)
    assert done.code == 2 and len(done.ours) == 1 and message in done.ours[0], done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_an_unreadable_image_is_named_before_training(images: Path) -> None:
    bad = images / "train" / "b" / "5.png"
    sound = bad.read_bytes()
    bad.write_bytes(sound[:40])
    try:
        done = swap_hpc(
            "train", "digits", *FOLDER, "--data", images, "--out", images / "out", ranks=2
        )
    finally:
        bad.write_bytes(sound)
    assert (
        done.code == 2 and len(done.ours) == 1 and f"cannot decode the image {bad}" in done.ours[0]
    ), done.stderr


def test_an_unreadable_image_in_streamed_data_ends_the_run_when_it_is_met(
    images: Path, tmp_path: Path
) -> None:
    bad = images / "train" / "a" / "3.png"
    sound = bad.read_bytes()
    bad.write_bytes(sound[:40])
    streamed = ("--set", "data.memory_gib=0", "--set", "data.image_size=8", "--data", str(images))
    try:
        done = swap_hpc("train", "digits", *FOLDER, *streamed, "--out", tmp_path / "out", ranks=2)
    finally:
        bad.write_bytes(sound)
    assert (
        done.code == 3 and len(done.ours) == 1 and f"cannot decode the image {bad}" in done.ours[0]
    ), done.stderr


def test_a_rank_that_raises_ends_all_ranks_with_its_traceback_once(tmp_path: Path) -> None:
    raising = (
        "--set",
        "model.name=failing:raises_on_rank_1",
        "--set",
        "groups=3",
        "--set",
        "large_batch.batch_size=240",
    )
    done = swap_hpc(
        "train",
        "digits",
        *raising,
        "--out",
        tmp_path / "out",
        ranks=3,
        variables={"PYTHONPATH": str(TESTS)},
    )
    assert done.code == 3
    assert (
        done.stderr.count("Traceback (most recent call last)") == 1 and "/typer/" not in done.stderr
    )
    assert done.stderr.count("ArithmeticError: rank 1 cannot go on") == 1
    raised = float(
        next(line for line in done.stdout.splitlines() if line.startswith("raising at")).split()[-1]
    )
    assert done.seconds < 60 and _now() - raised < 10


def test_a_rank_whose_gpu_is_full_ends_all_with_one_line(tmp_path: Path) -> None:
    """As wrong input: a batch script must not start it again."""
    full = ("--set", "model.name=failing:fills_the_memory_on_rank_1", "--set", "groups=2")
    done = swap_hpc(
        "train",
        "digits",
        *full,
        "--out",
        tmp_path / "out",
        ranks=2,
        variables={"PYTHONPATH": str(TESTS)},
    )
    assert done.code == 2 and len(done.ours) == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.ours[0].startswith(
        "swap-hpc: the GPU's memory is full (CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...):"
    )


def _now() -> float:
    import time

    return time.time()


def test_a_loss_that_is_not_finite_is_said_once(tmp_path: Path) -> None:
    """By one of the two ranks of one of the two groups, and the last good model stays."""
    rate = (
        "--set",
        "groups=2",
        "--set",
        "large_batch.epochs=1",
        "--set",
        "refine.learning_rate=1e30",
    )
    done = swap_hpc("train", "digits", *rate, "--out", tmp_path, ranks=4)
    assert done.code == 3 and len(done.ours) == 1, done.stderr
    assert (
        "in refine of group" in done.ours[0]
        and "at a learning rate of 1e+30: lower the rate" in done.ours[0]
    )
    assert (tmp_path / "large_batch.safetensors").exists() and not (
        tmp_path / "result.json"
    ).exists()
    assert list((tmp_path / "checkpoints").glob("large_batch-00001-*.safetensors"))


def test_wrong_input_that_one_rank_alone_meets_ends_all(tmp_path: Path) -> None:
    failing = ("--set", "model.name=failing:refuses_on_rank_1")
    done = swap_hpc(
        "train",
        "digits",
        *failing,
        "--out",
        tmp_path / "out",
        ranks=2,
        variables={"PYTHONPATH": str(TESTS)},
    )
    assert done.code == 2 and done.ours == [
        "swap-hpc: model failing:refuses_on_rank_1 refuses its arguments: not on this rank"
    ]


@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        (
            "has_two_classes",
            2,
            "the model failing:has_two_classes returned a tensor [128, 2] float32: logits [128, 10] are needed",
        ),
        (
            "missing",
            2,
            "the model failing:missing: failing has no missing; it has raises_on_rank_1, has_two_classes, leaves, refuses",
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
    fields = ("--set", f"model.name=failing:{model}")
    done = swap_hpc(
        "train",
        "digits",
        *fields,
        "--out",
        tmp_path / "out",
        ranks=2,
        variables={"PYTHONPATH": str(TESTS)},
    )
    assert done.code == code and message in done.stderr, done.stderr
    assert code == 3 or (len(done.ours) == 1 and "Traceback" not in done.stderr)


def test_a_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    done = swap_hpc("train", "digits", "--out", tmp_path / "out")
    assert done.code == 2 and done.ours == [
        f"swap-hpc: --out {tmp_path}/out is a file: name a folder"
    ]


def test_another_recipe_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        (TESTS.parent / "swap_hpc" / "recipe" / "digits.toml").read_text()
        + "\n[evaluate]\nevery = 3\n"
    )
    done = swap_hpc("train", "digits", "--out", tmp_path)
    assert (
        done.code == 2
        and "holds a run of another recipe (evaluate.every, name differ): choose another --out"
        in done.ours[0]
    )


@pytest.mark.parametrize(
    "line",
    [("recipes",), ("bench",), ("train", "digits", "--set", "model.width=4", "--out", "{out}")],
    ids=str,
)
def test_a_reader_that_goes_away_gets_no_traceback(line: tuple[str, ...], tmp_path: Path) -> None:
    """As `| head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [BIN / "swap-hpc", *(word.format(out=tmp_path / "out") for word in line)],
        stdout=writing,
        stderr=-1,
        text=True,
    )
    os.close(writing)
    assert done.returncode == 1 and "BrokenPipeError" not in done.stderr, done.stderr
