"""No field of [data] and [augment] is ignored: it has an effect on the data, or it is refused."""

import hashlib
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from swap_hpc.data import load
from swap_hpc.data.fields import USES, check_fields
from swap_hpc.data.pack import pack
from swap_hpc.data.sampling import Key
from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.augment import Augment
from swap_hpc.recipe.inputs import Data
from swap_hpc.recipe.loading import recipe_of
from swap_hpc.recipe.phase import Phase
from swap_hpc.recipe.schema import Recipe
from swap_hpc.train.job import Job

ALONE = Team.alone()


@lru_cache
def folder(root: Path) -> Path:
    """Make two folders of noise in three classes, and shards of both, below `root`."""
    generator = np.random.default_rng(0)
    for copy in ("images", "images-other"):
        for split, number in (("train", 16), ("test", 4)):
            for label in "abc":
                place = root / copy / split / label
                place.mkdir(parents=True)
                for i in range(number):
                    size = (24, 20)
                    pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(place / f"{i}.png")
    for copy, shards in (("images", "shards"), ("images-other", "shards-other")):
        pack(root / copy, root / shards, 20, ALONE, lambda text: None)
    return root


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("fields"))


# How each kind of data is named in a recipe; ROOT stands for a folder of images.
KINDS: dict[str, dict[str, Any]] = {
    "digits": {"name": "digits"},
    "synthetic": {"name": "synthetic", "samples": 48, "image_size": 8},
    "decoded": {"name": "folder", "path": "ROOT/images", "image_size": 16},
    "files": {"name": "folder", "path": "ROOT/images", "image_size": 16, "memory_gib": 0},
    "shards": {"name": "webdataset", "path": "ROOT/shards", "image_size": 16, "memory_gib": 0},
    "own arrays": {"name": "own_data:arrays"},
    "own batches": {"name": "own_data:batches"},
    "own graph": {"name": "own_data:graph"},
}


def other_data(field: str, base: dict[str, Any]) -> dict[str, Any]:
    """Return another value of a field of `[data]`, and of those that it needs beside it."""
    others: dict[str, Any] = {
        "arguments": {"size": 9},
        "path": base.get("path", "ROOT/images") + "-other",
        "test_every": 4,
        "validation": 9,
        "image_size": 12,
        "evaluation_size": 12,
        "evaluation_crop": 0.5,
        "memory_gib": 0 if "memory_gib" not in base else 2.0,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "classes": 4,
        "samples": 40,
    }
    beside = {"path": "ROOT/images/train"} if field == "test_every" else {}
    return {**beside, field: others[field]}


FIELDS = sorted(USES.keys() - {"name"})

# Another value of each field of `[augment]`, and of those that it needs beside it.
AUGMENT: dict[str, dict[str, Any]] = {
    "crop_area": {"crop_area": [0.3, 1.0]},
    "crop_ratio": {"crop_area": [0.3, 1.0], "crop_ratio": [0.5, 2.0]},
    "pad": {"pad": 2},
    "flip": {"flip": True},
    "cutout": {"cutout": 3},
    "randaugment": {"randaugment": 2},
    "randaugment_magnitude": {"randaugment": 2, "randaugment_magnitude": 20},
    "trivial_augment": {"trivial_augment": True},
    "brightness": {"brightness": 0.4},
    "contrast": {"contrast": 0.4},
    "saturation": {"saturation": 0.4},
    "hue": {"hue": 0.1},
    "erasing": {"erasing": 0.5},
    "erasing_area": {"erasing": 1.0, "erasing_area": [0.4, 0.5]},
    "erasing_ratio": {"erasing": 1.0, "erasing_ratio": [0.5, 0.6]},
    "mixup": {"mixup": 0.5},
    "cutmix": {"cutmix": 1.0},
    "cutmix_share": {"mixup": 0.5, "cutmix": 1.0, "cutmix_share": 0.9},
}


def placed(fields: dict[str, Any], root: Path) -> dict[str, Any]:
    return {
        name: value.replace("ROOT", str(root)) if isinstance(value, str) else value
        for name, value in fields.items()
    }


def recipe(data: dict[str, Any], augment: dict[str, Any]) -> Recipe:
    fields: dict[str, Any] = {
        "model": {"name": "tiny:plain"},
        "data": data,
        "augment": augment,
        "large_batch": {"batch_size": 12, "epochs": 1, "learning_rate": 0.1},
        "refine": {"batch_size": 12, "epochs": 1, "learning_rate": 0.1},
        "evaluate": {"batch_size": 12},
    }
    return Recipe.model_validate(fields)


def seen(recipe: Recipe) -> str:
    """Return a hash of the data's size, of two training batches and of one test batch."""
    dataset = load(recipe.data, ALONE, 1)
    check_fields(recipe.data, recipe.augment, dataset)
    job = Job(recipe, dataset, tiny.CPU)
    digest = hashlib.sha256(repr((len(dataset.train), dataset.classes)).encode())
    digest.update(type(dataset.train).__name__.encode())
    training = job.training_batches(recipe.large_batch, Key(0, Phase.LARGE_BATCH), ALONE)
    for inputs, targets in (*islice(training, 2), next(job.test_batches(ALONE))):
        digest.update(inputs.numpy().tobytes() + targets.numpy().tobytes())
    return digest.hexdigest()


def test_every_field_is_tested() -> None:
    """Whoever adds a field says here how to change it, and in `USES` what data it is for."""
    assert Data.model_fields.keys() == USES.keys()
    assert Augment.model_fields.keys() == AUGMENT.keys()


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_the_data_has_an_effect_or_is_refused(field: str, root: Path) -> None:
    kinds = []
    for kind, base in KINDS.items():
        try:
            found = seen(recipe(placed(base | other_data(field, base), root), {}))
        except (UserError, ValueError) as error:
            assert field in str(error), f"{kind}: {error}"
            continue
        before = seen(recipe(placed(base, root), {}))
        assert found != before, f"data.{field} is ignored for {kind}"
        kinds.append(kind)
    assert kinds, f"data.{field} is always refused"


@pytest.mark.parametrize("field", AUGMENT)
def test_an_augmentation_has_an_effect_or_is_refused(field: str, root: Path) -> None:
    beside = {name: value for name, value in AUGMENT[field].items() if name != field}
    for kind in ("decoded", "files", "own arrays"):
        data = placed(KINDS[kind], root)
        changed = seen(recipe(data, AUGMENT[field]))
        assert changed != seen(recipe(data, beside)), f"augment.{field} is ignored for {kind}"
    for kind in ("own batches", "own graph"):
        with pytest.raises(UserError, match=f"augment.{next(iter(AUGMENT[field]))} has no effect"):
            seen(recipe(KINDS[kind], AUGMENT[field]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resolved_recipe_lists_all_defaults_and_is_accepted(kind: str, root: Path) -> None:
    resolved = recipe_of(recipe(placed(KINDS[kind], root), {}).to_toml(), "recipe.toml")
    check_fields(resolved.data, resolved.augment, load(resolved.data, ALONE, 1))


REFUSED = [
    ({"name": "digits"}, {"hue": 0.1}, "augment.hue is for images of 3 channels"),
    (
        {"name": "digits", "image_size": 16},
        {},
        r"data.image_size has no effect here \(given: \(\(0, 16\),\)\): it is for image files, "
        "shards and synthetic data, and digits are in memory; leave it out",
    ),
    (
        {"name": "own_data:batches"},
        {"flip": True},
        r"augment.flip has no effect here \(given: True\): it is for images that the package reads "
        "or holds in memory, and own_data:batches makes its batches itself; leave it out",
    ),
    (
        {"name": "synthetic", "image_size": [[0, 8], [1, 16]]},
        {},
        "data.image_size has several sizes: only image files that are read in every epoch change",
    ),
    (
        {"name": "folder", "path": "ROOT/images", "image_size": [[0, 8], [1, 16]]},
        {"cutout": 9},
        "augment.pad = 0 and augment.cutout = 9 do not fit images of 8 pixels: make them smaller",
    ),
    (
        {"name": "digits", "mean": [0.5] * 3},
        {},
        "data.mean has 3 numbers, but the images have 1 c",
    ),
]


@pytest.mark.parametrize(("data", "augment", "message"), REFUSED)
def test_the_message_names_the_field_and_the_data(
    data: dict[str, Any], augment: dict[str, Any], message: str, root: Path
) -> None:
    with pytest.raises(UserError, match=message):
        seen(recipe(placed(data, root), augment))
