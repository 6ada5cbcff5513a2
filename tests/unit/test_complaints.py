"""Wrong TOML files: each message is one line that names the field and what was given."""

import copy
import datetime
import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from swap_hpc.recipe.complaints import complaints
from swap_hpc.recipe.loading import shipped_recipes, tomllib
from swap_hpc.recipe.schema import Recipe
from swap_hpc.recipe.section import models_in
from swap_hpc.study.study import Study

RECIPE = tomllib.loads(shipped_recipes()["digits"].read_text())
STUDY = {
    "title": "tiny",
    "recipe": "digits",
    "ranks": 2,
    "seeds": [0, 1],
    "search": {"seeds": [5], "set": ["data.validation=100"]},
    "runs": {
        "first": {"set": ["refine.epochs=0"]},
        "swap": {"from": "first", "set": ["refine.learning_rate={rate}"], "rates": [0.1, 0.2]},
    },
    "rows": [{"method": "before", "run": "first"}, {"method": "after", "run": "swap"}],
    "differences": [["after", "before"]],
}

# What pydantic calls things, and shows of its own.
OF_PYDANTIC = re.compile(
    r"Input|Field required|Extra inputs|valid (tuple|bool|int|str|dict|num|list)|unable to|"
    r"should|instance of|after validation|<|Value error|literal\[|tuple\[|function"
)

Path = tuple[str | int, ...]


def with_value(fields: dict[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """Return a copy of a file's fields with another value at one place."""
    changed = copy.deepcopy(fields)
    place: Any = changed
    for part in path[:-1]:
        place = place.setdefault(part, {}) if isinstance(place, dict) else place[part]
    place[path[-1]] = value
    return changed


def message(model: type[BaseModel], fields: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as error:
        model.model_validate(fields)
    return complaints(error.value, model)


def recipe_paths() -> Iterator[Path]:
    """Yield the place of every section and every field of a recipe."""
    for name, field in Recipe.model_fields.items():
        yield (name,)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from ((name, inner.alias or own) for own, inner in kind.model_fields.items())
    of_group = Recipe.model_fields["optimizer"].annotation.model_fields["groups"]  # type: ignore
    (group, _) = of_group.annotation.__args__
    yield from (("optimizer", "groups", 0, name) for name in group.model_fields)


def study_paths() -> Iterator[Path]:
    """Yield the place of every field of a study."""
    kinds = Study.model_fields
    yield from ((field.alias or name,) for name, field in kinds.items())
    yield from (("search", name) for name in ("seeds", "set"))
    run = kinds["runs"].annotation.__args__[1]  # type: ignore[union-attr]
    fields = [field.alias or name for name, field in run.model_fields.items()]
    yield from (("runs", "swap", name) for name in fields)
    yield from (("rows", 1, name) for name in ("method", "run", "model"))
    yield from [("seeds", 1), ("differences", 0), ("differences", 0, 1), ("runs", "swap")]
    yield ("search", "set", 0)


DATE = datetime.date(2026, 1, 31)  # TOML has dates, and no field is one


@pytest.mark.parametrize("path", recipe_paths(), ids=str)
def test_every_field_of_a_recipe_is_named_with_what_was_given(path: Path) -> None:
    fields = with_value(RECIPE, ("optimizer", "groups"), [{"match": "*"}])
    _check(message(Recipe, with_value(fields, path, DATE)), path)


@pytest.mark.parametrize("path", study_paths(), ids=str)
def test_every_field_of_a_study_is_named_with_what_was_given(path: Path) -> None:
    _check(message(Study, with_value(STUDY, path, DATE)), path)


def _check(text: str, path: Path) -> None:
    name = ".".join(part for part in path if isinstance(part, str))
    items = [f"item {part + 1}" for part in path if isinstance(part, int)]
    place = f"{name} ({' of '.join(reversed(items))})" if items else name
    # texts of our own, such as a list of names, may follow
    needs = re.fullmatch(rf"{re.escape(place)}: needs .* \(given: 2026-01-31\)", text)
    assert needs, text
    assert not OF_PYDANTIC.search(text.removeprefix(place).partition(' or "package')[0]), text


def of_numbers(paths: Iterator[Path], model: type[BaseModel]) -> Iterator[Path]:
    """Yield the paths of those fields that take numbers, and neither true nor anything."""
    for path in paths:
        section: Any = model
        for part in path[:-1]:
            if isinstance(part, str) and part in section.model_fields:
                section = (models_in(section.model_fields[part].annotation) or [section])[0]
        aliases = {field.alias or name: field for name, field in section.model_fields.items()}
        if isinstance(path[-1], str) and path[-1] in aliases:
            kind = str(aliases[path[-1]].annotation)
            if re.search(r"\b(int|float)\b", kind) and not re.search(r"\b(bool|Any)\b", kind):
                yield path


NUMBERS = sorted(of_numbers(recipe_paths(), Recipe), key=str)


def test_fields_of_numbers_are_found() -> None:
    some = [("groups",), ("augment", "mixup"), ("augment", "randaugment"), ("data", "mean")]
    some += [("optimizer", "momentum"), ("refine", "learning_rate"), ("data", "image_size")]
    assert set(some) <= set(NUMBERS) and ("optimizer", "groups", 0, "weight_decay") in NUMBERS
    assert ("augment", "flip") not in NUMBERS and ("model", "pretrained") not in NUMBERS


@pytest.mark.parametrize("path", NUMBERS, ids=str)
def test_a_truth_value_is_no_number(path: Path) -> None:
    fields = with_value(RECIPE, ("optimizer", "groups"), [{"match": "*"}])
    for value, needs in (
        (True, "needs a number, not true or false (given: true)"),
        ([[0, False]], "needs numbers, not true or false (given: [[0, false]])"),
    ):
        assert needs in message(Recipe, with_value(fields, path, value))


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"shape": "cosine", "peak": True}, "refine.learning_rate.peak"),
        ({"shape": "step", "peak": 0.1, "at": [True]}, "refine.learning_rate.at"),
    ],
)
def test_a_truth_value_is_no_number_of_a_schedule(fields: dict[str, Any], place: str) -> None:
    text = message(Recipe, with_value(RECIPE, ("refine", "learning_rate"), fields))
    assert text.startswith(f"{place}: needs ") and "not true or false" in text


def test_a_truth_value_is_no_rate_of_a_study() -> None:
    text = message(Study, with_value(STUDY, ("runs", "swap", "rates"), [0.1, True]))
    assert text == "runs.swap.rates: needs numbers, not true or false (given: [0.1, true])"


MODELS = '"large_batch", "large_batch_ema", "mean_of_groups" or "averaged"'

CASES: list[tuple[type[BaseModel], Path, Any, str]] = [
    (Recipe, ("groups",), 0, "groups: needs at least 1 (given: 0)"),
    (Recipe, ("groups",), "four", "groups: needs a whole number (given: 'four')"),
    (Recipe, ("groups",), 1.5, "groups: needs a whole number (given: 1.5)"),
    (Recipe, ("groups",), [4], "groups: needs a whole number (given: [4])"),
    (Recipe, ("compile",), "yes please", "compile: needs true or false (given: 'yes please')"),
    (Recipe, ("name",), True, "name: needs a text (given: true)"),
    (Recipe, ("label_smoothing",), "much", "label_smoothing: needs a number (given: 'much')"),
    (Recipe, ("seed",), float("nan"), "seed: needs a finite number (given: nan)"),
    (Recipe, ("model",), "resnet9", "model: needs a table (given: 'resnet9')"),
    (Recipe, ("model", "weights"), 3, "model.weights: needs a path, as a text (given: 3)"),
    (
        Recipe,
        ("model", "pretrained"),
        [3],
        "model.pretrained: needs true or false or a text (given: [3])",
    ),
    (
        Recipe,
        ("model", "weights_except"),
        ["head.*", 3],
        "model.weights_except (item 2): needs a text (given: 3)",
    ),
    (
        Recipe,
        ("data", "mean"),
        [127.0],
        "data.mean: needs a number from 0 to 1 for each channel (pixels are in [0, 1]) "
        'or "imagenet" (given: [127.0])',
    ),
    (Recipe, ("data", "mean"), "cifar", "data.mean: needs a list or \"imagenet\" (given: 'cifar')"),
    (
        Recipe,
        ("data", "mean"),
        [0.5, "much"],
        "data.mean (item 2): needs a number (given: 'much')",
    ),
    (
        Recipe,
        ("augment", "crop_area"),
        [0.5],
        "augment.crop_area: has too few items (given: [0.5])",
    ),
    (
        Recipe,
        ("augment", "crop_area"),
        [0.1, 0.2, 0.3],
        "augment.crop_area: needs at most 2 items (given: [0.1, 0.2, 0.3])",
    ),
    (
        Recipe,
        ("refine", "learning_rate"),
        [[0, 0.1], [8, "x"]],
        "refine.learning_rate (item 2 of item 2): needs a number (given: 'x')",
    ),
    (
        Recipe,
        ("refine", "learning_rate"),
        {"shape": "cosine", "peak": 0.1, "warm": 1},
        "unknown field refine.learning_rate.warm; valid here: peak, warmup, start, end, shape",
    ),
    (
        Recipe,
        ("optimizer", "groups"),
        [{"match": "*.bias"}, {"match": []}],
        "optimizer.groups.match (item 2): needs at least 1 item (given: [])",
    ),
    (Recipe, ("model",), {"width": 4}, "model.name is missing"),
    (
        Recipe,
        ("data", "image_size"),
        {"first": 32},
        "data.image_size: needs a whole number of pixels, at least 1, or pairs from an epoch on: "
        "[[0, 128], [8, 160]] (given: {first = 32})",
    ),
    *(
        (
            Recipe,
            ("data", "image_size"),
            value,
            "data.image_size: needs a whole number of pixels, at least 1, or pairs from an epoch "
            f"on: [[0, 128], [8, 160]] (given: {given})",
        )
        for value, given in (("big", "'big'"), (0, "0"), (32.5, "32.5"))
    ),
    (
        Study,
        ("rows",),
        [{"method": "a", "run": "first", "model": "best"}, {"run": "swap", "model": "worst"}],
        f"rows.model (item 1): needs {MODELS} (given: 'best'); rows.method (item 2) is missing; "
        f"rows.model (item 2): needs {MODELS} (given: 'worst')",
    ),
    (Study, ("rows",), [], "rows: needs at least 1 item (given: [])"),
    (Study, ("runs", "swap", "ranks"), 0, "runs.swap.ranks: needs at least 1 (given: 0)"),
    (
        Study,
        ("runs", "swap", "rates"),
        ["a"],
        "runs.swap.rates (item 1): needs a number (given: 'a')",
    ),
    (
        Study,
        ("runs", "swap", "sets"),
        [],
        "unknown field runs.swap.sets; valid here: recipe, ranks, set, from, rates, search_set",
    ),
    (
        Study,
        ("differences",),
        [["after", "before"], ["after"]],
        "differences (item 2): has too few items (given: ['after'])",
    ),
]


@pytest.mark.parametrize(
    ("model", "path", "value", "expected"), CASES, ids=[f"{p} {v}" for _, p, v, _ in CASES]
)
def test_a_wrong_value_is_told_in_our_words(
    model: type[BaseModel], path: Path, value: Any, expected: str
) -> None:
    assert message(model, with_value(RECIPE if model is Recipe else STUDY, path, value)) == expected


def test_a_long_value_is_shortened_in_its_middle() -> None:
    text = message(Recipe, with_value(RECIPE, ("groups",), list(range(1000))))
    assert re.fullmatch(r"groups: needs a whole number \(given: \[0, 1.* \.\.\. .*, 999\]\)", text)
    assert len(text) < 140


def test_a_run_may_be_named_like_a_field() -> None:
    runs = {"ranks": {"ranks": 0}}
    text = message(Study, STUDY | {"runs": runs, "rows": [{"method": "a", "run": "ranks"}]})
    assert text.startswith("runs.ranks.ranks: needs at least 1 (given: 0)")
