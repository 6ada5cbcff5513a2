"""No field of a recipe is ignored: it has an effect, or a line says that it has none.

A new field fails here until somebody decides where it belongs.
"""

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from pydantic import BaseModel
from torch import nn

from swap_hpc.data.dataset import with_validation
from swap_hpc.errors import UserError
from swap_hpc.recipe.optimizer import ParameterGroup
from swap_hpc.recipe.schema import Recipe
from swap_hpc.recipe.section import Section, models_in
from swap_hpc.recipe.training import LargeBatch, Refine
from swap_hpc.run.best import check_best
from swap_hpc.run.idle_fields import idle_fields
from swap_hpc.train.optimizers import build_optimizer

TESTS = Path(__file__).parents[1]


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all fields; those of tables that a field may hold, too."""
    for name, field in section.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        if not is_section:
            yield prefix + name
        for inner in models_in(field.annotation):
            yield from leaves(inner, f"{prefix}{name}.")


# Whatever the rest of a recipe is, these have an effect; of a phase, where it is trained.
ALWAYS = {
    "name",
    "seed",
    "precision",
    "compile",
    "loss",
    "metrics",
    "metrics.name",
    "metrics.smaller_is_better",
    "device",
    "tensorboard",
    "tracker",
    "model.name",
    "model.weights",
    "large_batch.stop_accuracy",
    "refine.cycles",
    "evaluate.batch_size",
    "evaluate.every",
    "checkpoint.epochs",
    "checkpoint.minutes",
    "checkpoint.keep",
    "watchdog.minutes",
    *(
        f"{phase}.{name}"
        for phase in ("large_batch", "refine")
        for name in ("batch_size", "epochs", "learning_rate", "accumulate", "ema")
    ),
    *(
        f"{phase}.learning_rate.{name}"
        for phase in ("large_batch", "refine")
        for name in ("shape", "peak", "warmup", "end", "at", "factor")
    ),
}

# Sections whose fields a test of their own goes over: the section, the test's file and its name.
TESTED = {
    "data": ("unit/test_fields.py", "test_a_field_of_the_data_has_an_effect_or_is_refused"),
    "augment": ("unit/test_fields.py", "test_an_augmentation_has_an_effect_or_is_refused"),
    "optimizer": (
        "unit/test_optimizer_classes.py",
        "test_a_field_changes_the_optimizer_or_is_refused",
    ),
    "optimizer.groups": (
        "unit/test_every_field.py",
        "test_a_field_of_a_parameter_group_has_an_effect_or_is_refused",
    ),
}

# Fields of hardware that a recipe may travel to: accepted everywhere.
HARDWARE = ("cudnn_benchmark", "deterministic")

# Nothing but the refinement needs them, and `refine.epochs = 0` leaves it out of any recipe.
REFINEMENT = {"groups"}

Fields = dict[str, Any]

NO_BATCHNORM: Fields = {"model": {"name": "tiny:plain"}}
FROZEN: Fields = {"model": {"name": "test_every_field:frozen"}}
EVERY_THIRD_STEP: Fields = {"refine": {"average_every_steps": 3}}
START: Fields = {"learning_rate": {"shape": "cosine", "peak": 0.1, "start": 0.05}}
WARM_START: Fields = {"learning_rate": START["learning_rate"] | {"warmup": "50%"}}

# A recipe in which every field has an effect, for `tiny.recipe`.
USUAL: Fields = {
    "groups": 2,
    "model": {"name": "tiny:normed"},
    "batchnorm": {"batch_size": 512, "samples": None},
}

# A recipe in which the field has no effect, and what to change so that it has one.
CONDITIONAL: dict[str, tuple[Fields, Fields]] = {
    "label_smoothing": (
        {"label_smoothing": 0.1, "loss": "own:loss"},
        {"loss": "cross_entropy"},
    ),
    "channels_last": (
        {"channels_last": True, "model": {"name": "test_every_field:flat"}},
        {"model": {"name": "tiny:normed"}},
    ),
    "model.weights_entry": (
        {"model": {"name": "tiny:normed", "weights_entry": "ema"}},
        {"model": {"name": "tiny:normed", "weights_entry": "ema", "weights": "w.pt"}},
    ),
    "model.weights_except": (
        {"model": {"name": "tiny:normed", "weights_except": ["head.*"]}},
        {"model": {"name": "tiny:normed", "weights_except": ["head.*"], "weights": "w.pt"}},
    ),
    "model.pretrained": (
        {"model": {"name": "resnet9", "pretrained": True}},
        {"model": {"name": "test_every_field:flat", "pretrained": True}},
    ),
    "large_batch.batchnorm_batch_size": (
        {"large_batch": {"batchnorm_batch_size": 24}} | NO_BATCHNORM,
        {"model": {"name": "tiny:normed"}},
    ),
    "large_batch.learning_rate.start": ({"large_batch": START}, {"large_batch": WARM_START}),
    "refine.learning_rate.start": ({"refine": START}, {"refine": WARM_START}),
    "refine.evaluate_average": (
        {"refine": {"evaluate_average": 3, "epochs": 2}},
        {"refine": {"evaluate_average": 3, "epochs": 2, "cycles": 2}},
    ),
    "refine.average_every_steps": (EVERY_THIRD_STEP | {"groups": 1}, {"groups": 2}),
    "batchnorm.batch_size": (
        {"batchnorm": {"batch_size": 30, "samples": None}} | NO_BATCHNORM,
        {"model": {"name": "tiny:normed"}},
    ),
    "batchnorm.samples": (
        FROZEN | {"batchnorm": {"batch_size": 512, "samples": 600}},
        {"model": {"name": "tiny:normed"}},
    ),
    "checkpoint.min_seconds": (
        {"checkpoint": {"epochs": 0, "min_seconds": 3}},
        {"checkpoint": {"epochs": 1, "min_seconds": 3}},
    ),
    "checkpoint.snapshots": (
        {"checkpoint": {"snapshots": 3}},
        {"large_batch": {"epochs": 3}},
    ),
    "checkpoint.best": (
        {"checkpoint": {"best": True}},
        {"data": {"validation": 20}},
    ),
}


def flat(classes: int, channels: int, pretrained: bool = False) -> nn.Module:
    """Return a model without batch norm and without convolutions."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))


def frozen(classes: int, channels: int) -> nn.Module:
    """Return a model whose batch norm keeps the statistics that it has."""
    model = tiny.normed(classes, channels)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    return model


def told(**fields: Any) -> list[str]:
    """Return what a run says of fields without an effect: why it is refused, or its notes."""
    try:
        recipe = tiny.recipe(**USUAL | fields)
        data = with_validation(tiny.dataset(), recipe.data.validation)
        job = replace(tiny.job(), recipe=recipe, dataset=data)
        check_best(job)
        return idle_fields(recipe, tiny.model(job))
    except UserError as error:
        return [str(error)]


def decided() -> list[str]:
    tested = [name for name in leaves(Recipe) if name.rpartition(".")[0] in TESTED]
    return [*ALWAYS, *HARDWARE, *REFINEMENT, *CONDITIONAL, *tested]


def test_it_is_decided_of_every_field_what_becomes_of_it_without_an_effect() -> None:
    names = decided()
    assert sorted(names) == sorted(set(leaves(Recipe)))
    for file, test in TESTED.values():
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_new_field_is_seen_at_any_place() -> None:
    class Longer(Refine):
        another: int = 0

    class More(Recipe):
        extra: int = 0
        refine: Longer

    assert set(leaves(More)) - set(decided()) == {"extra", "refine.another"}


@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_field_without_an_effect_is_named(name: str) -> None:
    idle, beside = CONDITIONAL[name]
    lines = told(**idle)
    assert len(lines) == 1 and "\n" not in lines[0], lines
    section, _, field = name.rpartition(".")
    assert section in lines[0] and field in lines[0]
    merged = {
        key: {**idle.get(key, {}), **value} if isinstance(value, dict) else value
        for key, value in (idle | beside).items()
    }
    assert told(**merged) == []


@pytest.mark.parametrize("name", HARDWARE)
def test_a_recipe_may_travel_between_machines(name: str) -> None:
    assert told(**{name: True}) == []


# Another value of each field of the phases, and of what belongs to the refinement alone.
OF_A_PHASE: Fields = {
    "accumulate": 3,
    "ema": 0.9,
    "stop_accuracy": 0.9,
    "batchnorm_batch_size": 8,
    "cycles": 3,
    "evaluate_average": 9,
    "average_every_steps": 3,
    "batch_size": 6,
    "learning_rate": [[0, 0.1], [9, 0.0]],
}


def test_a_phase_that_is_skipped_keeps_its_fields() -> None:
    """Any recipe makes a baseline by one field."""
    both = LargeBatch.model_fields.keys() | Refine.model_fields.keys()
    assert both - {"epochs"} == OF_A_PHASE.keys()
    for name in OF_A_PHASE.keys() & LargeBatch.model_fields.keys():
        skipped = {"epochs": 0, name: OF_A_PHASE[name]}
        model = {"name": "test_every_field:flat", "weights": "w.pt"}
        assert told(model=model, large_batch=skipped) == []
    of_refinement: Fields = {"groups": 4, "batchnorm": {"samples": 600}}
    for name in OF_A_PHASE.keys() & Refine.model_fields.keys():
        skipped = {"epochs": 0, name: OF_A_PHASE[name]}
        assert told(model={"name": "tiny:plain"}, **of_refinement, refine=skipped) == []


# Another value of each field of a parameter group, and one that has no effect.
OF_A_GROUP: dict[str, tuple[Fields, Fields]] = {
    "match": ({"match": "4.*", "weight_decay": 0.1}, {"match": "gone.*", "weight_decay": 0.1}),
    "learning_rate_scale": (
        {"match": "0.*", "learning_rate_scale": 0.5},
        {"match": "0.*", "learning_rate_scale": 0.5, "frozen": True},
    ),
    "weight_decay": (
        {"match": "0.*", "weight_decay": 0.2},
        {"match": "0.*", "weight_decay": 0.2, "frozen": True},
    ),
    "frozen": ({"match": "0.*", "frozen": True}, {"match": "*", "frozen": True}),
    "arguments": (
        {"match": "0.*", "arguments": {"dampening": 0.0, "maximize": True}},
        {"match": "0.*", "arguments": {"maximize": True}, "frozen": True},
    ),
}


@pytest.mark.parametrize("name", ParameterGroup.model_fields)
def test_a_field_of_a_parameter_group_has_an_effect_or_is_refused(name: str) -> None:
    def settings(*groups: Fields) -> list[Fields]:
        job = tiny.job(optimizer={"groups": list(groups)})
        optimizer = build_optimizer(tiny.model(job), job.recipe.optimizer)
        return [
            {key: value for key, value in group.items() if key != "params"}
            | {"shapes": [p.shape for p in group["params"]]}
            for group in optimizer.param_groups
        ]

    effective, idle = OF_A_GROUP[name]
    without = [] if name == "frozen" else [{"match": "0.*", "weight_decay": 0.1}]
    assert settings(effective) != settings(*without)
    wanted = "freezes" if name == "frozen" else name
    with pytest.raises(UserError, match=wanted):
        settings(idle)
