"""Whole runs of the kinds of models that users bring: train, stop, resume, average, evaluate."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
import zoo
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from swap_hpc.errors import Stopped, UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import tensor_bytes
from swap_hpc.recipe.loading import parse
from swap_hpc.recipe.phase import PHASE_1, Part
from swap_hpc.recipe.schema import Recipe
from swap_hpc.run import saved

MODELS: dict[str, dict[str, Any]] = {
    "swin_v2": {},
    "densenet": {},
    "old_weight_norm": {},
    "pruned": {},
    "gradient_mask": {},
    "frozen_batch_norm": {},
    "Complex": {},
    "dropping": {"coin": "python"},
}

STOPS = (5, 12)  # heartbeats of a start at which it stops: in phase 1, and after it


def recipe(name: str) -> Recipe:
    return parse(
        {
            "groups": 2,
            "device": "cpu",
            "model": {"name": f"zoo:{name}", **MODELS[name]},
            "data": {"name": "zoo:data"},
            "augment": {"pad": 1, "flip": True},
            "optimizer": {"weight_decay": 0.0},
            "large_batch": {"batch_size": 48, "epochs": 2, "learning_rate": 0.02},
            "refine": {"batch_size": 24, "epochs": 2, "learning_rate": 0.02},
            "batchnorm": {"batch_size": 48},
        }
    )


@pytest.mark.ranks(1, 2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_a_run_and_one_that_was_stopped_leave_the_mean_of_the_groups(
    world: Team, name: str, tmp_path: Path
) -> None:
    folder = Path(world.broadcast(str(tmp_path)))
    with fuzz.patched():
        result = fuzz.train(recipe(name), folder / "whole", world)
        for heartbeat in STOPS:
            with pytest.raises(Stopped):
                fuzz.train(recipe(name), folder / "stopped", world, fuzz.asked_at(heartbeat))
        fuzz.train(recipe(name), folder / "stopped", world)
        average = saved.average(folder / "whole", None, None, world)
        evaluated = saved.evaluate(folder / "whole" / "swap.safetensors", None, world)
    assert result and not fuzz.differing(folder / "whole", folder / "stopped")
    assert average.weights_sha256 == evaluated.weights_sha256 == result["weights_sha256"]
    assert evaluated.test.accuracy == result["test_accuracy"]["averaged"]
    check_mean(name, folder / "whole")


@pytest.mark.ranks(1, 2)
def test_ranks_of_a_group_end_alike_whatever_their_extra_states_saw(
    world: Team, tmp_path: Path
) -> None:
    """Over several cycles; the run itself compares the ranks' models at its end."""
    folder = Path(world.broadcast(str(tmp_path)))
    refine = {"batch_size": 24, "epochs": 1, "cycles": 2, "learning_rate": 0.02}
    changed = {"groups": 1, "model": {"name": "zoo:Seeing"}, "refine": refine}
    one_group = parse(recipe("pruned").model_dump() | changed)
    result = fuzz.train(one_group, folder / "run", world)
    average = saved.average(folder / "run", None, None, world)
    assert result and average.weights_sha256 == result["weights_sha256"]


def check_mean(name: str, run: Path) -> None:
    """Check the averaged model of a run.

    Its parameters are the groups' mean. All else, except batch norm's statistics, is the first
    group's.
    """
    torch.manual_seed(0)
    model = getattr(zoo, name)(3, 3, **MODELS[name])
    parameters = {name for name, _ in model.named_parameters()}
    first, second = (load_file(run / f"group-{g:03d}.safetensors") for g in (0, 1))
    averaged = load_file(run / "swap.safetensors")
    for entry, tensor in averaged.items():
        refreshed = "running" in entry or "tracked" in entry
        if entry in parameters:
            mean = (wide(first[entry]) + wide(second[entry])) / 2
            assert torch.equal(tensor, mean.to(tensor.dtype)), entry
        elif name == "frozen_batch_norm" or not refreshed:
            assert (tensor_bytes(tensor) == tensor_bytes(first[entry])).all(), entry
    if name == "gradient_mask":
        held = model.head.weight[:, :48]
        assert all(torch.equal(s["head.weight"][:, :48], held) for s in (first, second, averaged))


def wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


CLASSES = ("ant", "bee", "cat")


@pytest.mark.ranks(1, 2)
def test_data_that_changed_between_two_starts_are_refused(world: Team, tmp_path: Path) -> None:
    """A start, `evaluate` and `average` notice another image, and a class of another name.

    Such a class shifts the labels.
    """
    folder = Path(world.broadcast(str(tmp_path)))
    images, out = folder / "images", folder / "run"
    world.first(lambda: write_images(images))
    sizes = {"batch_size": 6, "epochs": 1, "learning_rate": 0.01}
    of_folder = parse(
        recipe("gradient_mask").model_dump()
        | {
            "data": {"name": "folder", "path": images},
            "large_batch": sizes,
            "refine": sizes,
            "batchnorm": {"batch_size": 6},
            "augment": {},
        }
    )

    def start(part: Part | None = None) -> object:
        return fuzz.train(of_folder, out, world, part=part)

    def evaluate() -> saved.Result:
        return saved.evaluate(out / "swap.safetensors", None, world)

    def average() -> object:
        return saved.average(out, None, None, world)

    def change(before: str, after: str) -> None:
        world.first(lambda: rename(images, before, after))

    def remove(name: str) -> None:
        world.first((images / name).unlink)

    def check_refused(message: str, command: Callable[[], object]) -> None:
        with pytest.raises(UserError, match=message):
            command()

    start(PHASE_1)
    facts = (out / "environment.json").read_bytes()
    world.barrier()
    change("ant/0.png", "bee/9.png")
    check_refused(r"other data \(9 training samples then, other names", start)
    change("bee/9.png", "ant/0.png")
    change("ant", "moth")
    check_refused("other classes: ant then, moth now", start)
    assert (out / "environment.json").read_bytes() == facts
    world.barrier()
    change("moth", "ant")
    assert start()
    change("cat", "aphid")
    check_refused("other classes: cat then, aphid now", evaluate)
    check_refused("other classes: cat then, aphid now", average)
    change("aphid", "cat")
    remove("test/cat/1.png")
    assert evaluate().notes == (
        "note: not the test samples of the run (9 test samples then, 8 now)",
    )
    remove("train/cat/1.png")
    check_refused("9 training samples then, 8 now", average)


def rename(folder: Path, before: str, after: str) -> None:
    for split in ("train", "test"):
        (folder / split / before).rename(folder / split / after)


def write_images(folder: Path) -> None:
    for split, name, number in product(("train", "test"), CLASSES, range(3)):
        path = folder / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (80 * number, 9, 9)).save(path)
