"""Recipes from TOML files and the command line, and the comparison of two recipes."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from swap_hpc.errors import UserError
from swap_hpc.recipe.complaints import complaints
from swap_hpc.recipe.earlier import name_metrics, without_unused_crops
from swap_hpc.recipe.schema import Recipe
from swap_hpc.recipe.section import models_in
from swap_hpc.recipe.values import from_disk

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = Path(__file__).parent

# Fields, and sections, that may differ between two starts of one run: they say where files lie and
# when the run is saved and watched, not what is computed.
MAY_CHANGE = ("data.path", "checkpoint.", "watchdog.", "tensorboard", "tracker")

# Of these sections, fields that may not: files depend on them from the first epoch on.
MUST_STAY = ("checkpoint.best",)

# Fields, and sections, that do not concern phase 1.
AFTER_PHASE_1 = ("name", "groups", "refine.", "batchnorm.", "evaluate.", "checkpoint.")


def shipped_recipes() -> dict[str, Path]:
    """Return name -> file of the recipes that come with the package."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def load_recipe(
    name: str,
    overrides: Iterable[str] = (),
    data: Path | None = None,
    extensions: Iterable[str] = (),
) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        name: A shipped recipe's name, or the path of a TOML file.
        overrides: Fields to set, as in "refine.epochs=10"; "refine.epochs=" gives a field its
            default.
        data: Replaces `data.path`.
        extensions: Further fields to set after these; errors name them as those of `--extend`.

    Raises:
        UserError: In one line: the recipe is unknown, the file is not TOML, or a field is unknown
            or wrong.
    """
    path = shipped_recipes().get(name, Path(name))
    if not path.is_file():
        raise UserError(
            f"no recipe {name!r}: neither a file nor one of {', '.join(shipped_recipes())}"
        )
    fields = read_toml(path)
    _apply_all(overrides, fields)
    _apply_all(extensions, fields, "--extend")
    fields.setdefault("name", _text(path.stem, "the recipe's name"))
    if data is not None:
        _set("data.path", _text(data, "--data"), fields)
    return parse(fields, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file, with or without a byte-order mark.

    Raises:
        UserError: In one line: the file cannot be read, or is not UTF-8 or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise UserError(
            f"{path} is not UTF-8, as TOML has to be (byte {byte:#x} in line {line}): "
            "save it as UTF-8"
        ) from None


def _text(name: str | Path, what: str) -> str:
    """Return an argument of the command line as text for a recipe; UserError if it is not UTF-8."""
    try:
        return from_disk(name)
    except UnicodeDecodeError:
        raise UserError(
            f"{what} {name} is not UTF-8, as recipes are: rename it, or use a link to it"
        ) from None


def recipe_of(
    text: str, source: str, data: Path | None = None, overrides: Iterable[str] = ()
) -> Recipe:
    """Return the recipe that `Recipe.to_toml` wrote.

    Args:
        text: The recipe as TOML.
        source: The name of the file in error messages.
        data: Replaces `data.path`.
        overrides: Fields to set, as `load_recipe` takes them.

    Raises:
        UserError: The text is not a recipe, or a field to set is unknown or wrong.
    """
    try:
        fields = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{source} holds no recipe: {error}") from None
    _apply_all(overrides, fields)
    recipe = parse(fields, source)
    if data is None:
        return recipe
    _text(data, "--data")
    moved = recipe.data.model_copy(update={"path": data})
    return recipe.model_copy(update={"data": moved})


def parse(fields: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Return a validated recipe from nested dictionaries.

    Raises:
        UserError: In one line, with every wrong field.
    """
    try:
        return Recipe.model_validate(without_unused_crops(fields))
    except ValidationError as error:
        raise UserError(f"{source}: {complaints(error, Recipe)}") from None


def _apply_all(overrides: Iterable[str], fields: dict[str, Any], option: str = "--set") -> None:
    """Set fields in nested dictionaries, in place.

    Args:
        overrides: The fields, as in "refine.epochs=10".
        fields: The dictionaries.
        option: Of the command line, which errors name.
    """
    texts = [_text(override, option) for override in overrides]
    if any(text.partition("=")[0].strip() == "metrics" for text in texts):
        name_metrics(fields)
    for text in texts:
        _apply(text, fields, option)


def _apply(override: str, fields: dict[str, Any], option: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{option} {override}: write it as {option} section.field=value")
    if not text.strip():
        _unset(key.strip(), fields, option)
        return
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    _set(key.strip(), value, fields, option)


def _unset(key: str, fields: dict[str, Any], option: str) -> None:
    """Remove the dotted `key` from nested dictionaries, in place.

    Raises:
        UserError: There is no such field, or it has no default.
    """
    *sections, name = key.split(".")
    forms: list[type[BaseModel]] = [Recipe]  # that the section may have; none: any keys are allowed
    for part in sections:
        forms = [form for field in _named(part, forms) for form in models_in(field.annotation)]
        fields = fields.get(part, {})
        if not isinstance(fields, dict):  # a field's value, or a list of sections
            raise UserError(f"{option} {key}=: {part} is a field, not a section")
    found = _named(name, forms)
    if not found and name not in fields:
        raise UserError(f"{option} {key}=: there is no such field to give its default to")
    if found and all(field.is_required() for field in found):
        raise UserError(f"{option} {key}=: the field has no default: give it a value")
    fields.pop(name, None)


def _named(name: str, forms: Iterable[type[BaseModel]]) -> list[FieldInfo]:
    """Return the fields of a name in all forms of a section that have it."""
    return [form.model_fields[name] for form in forms if name in form.model_fields]


def _set(key: str, value: Any, fields: dict[str, Any], option: str = "--set") -> None:
    """Set the dotted `key` in nested dictionaries, in place; UserError if it runs into a field."""
    *sections, field = key.split(".")
    for section in sections:
        fields = fields.setdefault(section, {})
        if not isinstance(fields, dict):
            raise UserError(f"{option} {key}={value}: {section} is a field, not a section")
    fields[field] = value


def differing_fields(one: Recipe, other: Recipe) -> list[str]:
    """Return the dotted names of the fields that differ, sorted, without those in `MAY_CHANGE`."""
    left, right = flat(one.model_dump()), flat(other.model_dump())
    names = (
        name
        for name in left.keys() | right.keys()
        if name in MUST_STAY or not name.startswith(MAY_CHANGE)
    )
    return sorted(name for name in names if left.get(name) != right.get(name))


def differing_in_phase_1(one: Recipe, other: Recipe) -> list[str]:
    """Return the dotted names of the fields about phase 1 that differ, sorted."""
    return [name for name in differing_fields(one, other) if not name.startswith(AFTER_PHASE_1)]


def check_same_recipe(recipe: Recipe, other: Recipe, found: str, remove: str) -> None:
    """Refuse to continue a run with another recipe; fields in `MAY_CHANGE` may differ.

    Args:
        recipe: The recipe of this start.
        other: The recipe of what an earlier start left.
        found: What holds `other`, the start of the message: "runs/x holds a run of".
        remove: What to remove otherwise, the end of the message: "the folder".

    Raises:
        UserError: The recipes differ; the message names the fields.
    """
    if differing := differing_fields(recipe, other):
        raise UserError(
            f"{found} another recipe ({', '.join(differing)} differ): "
            f"choose another --out, or remove {remove}"
        )


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with dotted names."""
    found: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
