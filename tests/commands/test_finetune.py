"""A vision transformer of timm, fine-tuned from a file of another program as its users would."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from launch import Finished, command, swap_hpc
from PIL import Image

TESTS = Path(__file__).parents[1]
RECIPE = TESTS / "examples" / "finetune.toml"
CLASSES = ("circles", "crosses", "stripes")
SAMPLES = {"train": 40, "val": 20, "test": 20}  # images per class
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

# Where a run may be killed: in a step of either phase (8 epochs of 5 steps, then 2 of 10), between
# the phases, before the average.
PLACES = [
    *(("large_batch", f"epoch {epoch}, step {step}") for epoch in (2, 5, 8) for step in (1, 3, 5)),
    *(("refine", f"epoch {epoch}, step {step}") for epoch in (1, 2) for step in (1, 4, 10)),
    ("between", ""),
    ("average", ""),
]


def picture(kind: str, generator: np.random.Generator) -> Image.Image:
    """Return a noisy picture of 32x32 pixels, of a shape at a random place."""
    y, x = np.mgrid[:32, :32]
    row, column = generator.integers(10, 22, 2)
    shapes = {
        "circles": (y - row) ** 2 + (x - column) ** 2 < 64,
        "crosses": (abs(y - row) < 3) | (abs(x - column) < 3),
        "stripes": (x + row) % 8 < 4,
    }
    noise = generator.integers(0, 100, (32, 32, 3))
    return Image.fromarray((noise + 120 * shapes[kind][..., None]).astype(np.uint8))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train, val and test, each with one folder per class."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, number in SAMPLES.items():
        for kind in CLASSES:
            place = folder / split / kind
            place.mkdir(parents=True)
            for i in range(number):
                picture(kind, generator).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as training programs write it: wrapped, with a prefix, for 1,000 classes."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=1000,
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=2,
        num_heads=3,
    )
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    file = tmp_path_factory.mktemp("pretrained") / "vit.pth"
    torch.save({"epoch": 300, "arch": "vit", "state_dict": state}, file)
    return file


@pytest.fixture(scope="module")
def options(images: Path, pretrained: Path) -> list[str]:
    fields = (f"model.weights={pretrained}", "checkpoint.min_seconds=0")
    return [str(RECIPE), "--data", str(images), *(f"--set={field}" for field in fields)]


@pytest.fixture(scope="module")
def run(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe, trained by two ranks without a break."""
    out = tmp_path_factory.mktemp("runs") / "vit"
    done = train(options, out)
    assert done.code == 0, done.stderr
    assert "state_dict" in done.stdout and "head.weight" in done.stdout  # taken, and left out
    return out


def train(options: list[str], out: Path) -> Finished:
    return swap_hpc("train", *options, "--out", out, ranks=2, variables=ONE_THREAD)


def result_of(out: Path) -> Any:
    return json.loads((out / "result.json").read_text())


def test_it_learns_and_reports_validation_and_test(run: Path) -> None:
    result = result_of(run)
    for split in ("validation_accuracy", "test_accuracy"):
        assert len(result[split]["groups"]) == 2
        assert result[split]["averaged"] > 0.6, result[split]  # chance is a third
    lines = [
        json.loads(line)
        for line in (run / "metrics" / "world.jsonl").read_text().split("\n")
        if line
    ]
    epochs = [line for line in lines if line["phase"] == "large_batch"]
    assert all(line["gradient_norm"] > 0 for line in epochs)
    assert max(line["learning_rate"] for line in epochs) <= 0.004
    assert epochs[-1]["learning_rate"] == 0  # the end of the cosine
    test = result["test_accuracy"]
    assert test["averaged"] > test["mean_of_groups"]


@pytest.mark.parametrize("seed", [18, 19])
def test_killed_at_a_seeded_place_it_ends_with_the_same_weights(
    seed: int, run: Path, options: list[str], tmp_path: Path
) -> None:
    out, mark = tmp_path / "vit", tmp_path / "mark"
    chosen = random.Random(seed)
    place, step = chosen.choice(PLACES)
    fault = {"kind": "kill", "place": place, "step": step, "rank": chosen.randrange(2)}
    program = (sys.executable, str(TESTS / "faults.py"), json.dumps({**fault, "mark": str(mark)}))
    line = (*program, "train", *options, "--out", str(out))
    killed = command(*line, ranks=2, variables=ONE_THREAD)
    assert killed.code and mark.exists(), (fault, killed.stderr)
    resumed = train(options, out)
    assert resumed.code == 0, resumed.stderr
    assert result_of(out)["weights_sha256"] == result_of(run)["weights_sha256"]


def test_a_greedy_average_is_chosen_by_validation_and_reported_on_test(run: Path) -> None:
    done = swap_hpc("average", run, "--greedy", "--json", ranks=2, variables=ONE_THREAD)
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    best = max(result_of(run)["validation_accuracy"]["groups"])
    assert report["validation_accuracy"] >= best
    assert 0 <= report["test_accuracy"] <= 1
    assert (run / "average-greedy.safetensors").is_file()
