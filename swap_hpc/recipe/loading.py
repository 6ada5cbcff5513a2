"""What to run: a TOML file, typed, validated and frozen.

Nothing is derived behind the user's back: batch sizes, epochs and learning rates are used as they are written, whatever
the number of ranks. Only what depends on the ranks is checked later, by `part.check_ranks`.
"""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import (
    BaseModel,
    ValidationError,
)

from swap_hpc.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
from swap_hpc.recipe.schema import Recipe, from_disk

SHIPPED = Path(__file__).parent

# Fields, and sections, that may differ between two starts of one run: where things lie and what is watched, not what is computed.
MAY_CHANGE = ("data.path", "checkpoint.", "watchdog.", "tensorboard")


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def load_recipe(name: str, overrides: Iterable[str] = (), data: Path | None = None) -> Recipe:
    """The recipe `name`, a shipped one's name or a path, with `overrides` ("refine.epochs=10") applied.

    Raises UserError, in one line: an unknown recipe, TOML that does not parse, an unknown or wrong field.
    """
    path = shipped_recipes().get(name, Path(name))
    if not path.is_file():
        raise UserError(
            f"no recipe {name!r}: neither a file nor one of {', '.join(shipped_recipes())}"
        )
    fields = read_toml(path)
    fields.setdefault("name", _text(path.stem, "the recipe's name"))
    for override in overrides:
        _apply(_text(override, "--set"), fields)
    if data is not None:
        _set("data.path", _text(data, "--data"), fields)
    return parse(fields, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds, with or without a byte-order mark. Raises UserError, in one line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    except UnicodeDecodeError as error:
        byte, line = error.object[error.start], 1 + error.object.count(b"\n", 0, error.start)
        raise UserError(
            f"{path} is not UTF-8, as TOML has to be (byte {byte:#x} in line {line}): save it as UTF-8"
        ) from None


def _text(name: str | Path, what: str) -> str:
    """What the command line was given, as text for a recipe. Raises UserError where it is no UTF-8."""
    try:
        return from_disk(name)
    except UnicodeDecodeError:
        raise UserError(
            f"{what} {name} is not UTF-8, as recipes are: rename it, or use a link to it"
        ) from None


def recipe_of(text: str, source: str, data: Path | None = None) -> Recipe:
    """The recipe that `to_toml` wrote, with its data elsewhere where `data` says so. Raises UserError."""
    try:
        recipe = parse(tomllib.loads(text), source)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{source} holds no recipe: {error}") from None
    if data is None:
        return recipe
    _text(data, "--data")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": data})})


def parse(fields: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """A validated recipe from nested dictionaries. Raises UserError with every wrong field in one line."""
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise UserError(
            f"{source}: " + "; ".join(one_line(each, Recipe) for each in error.errors())
        ) from None


def _apply(override: str, fields: dict[str, Any]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: write it as --set section.field=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    _set(key.strip(), value, fields)


def _set(key: str, value: Any, fields: dict[str, Any]) -> None:
    """Changes `fields`. Raises UserError."""
    *sections, field = key.split(".")
    for section in sections:
        fields = fields.setdefault(section, {})
        if not isinstance(fields, dict):
            raise UserError(f"--set {key}={value}: {section} is a field, not a section")
    fields[field] = value


def one_line(error: Any, model: type[BaseModel]) -> str:
    """An error of pydantic's, of a TOML file that `model` describes, for a person to read."""
    where = ".".join(str(part) for part in error["loc"] if isinstance(part, str))
    if error["type"] == "extra_forbidden":
        return (
            f"unknown field {where}; valid here: {', '.join(_fields_beside(error['loc'], model))}"
        )
    message = error["msg"].removeprefix("Value error, ")
    given = f" (given: {error['input']!r})" if where and error["type"] != "missing" else ""
    return f"{where}: {message}{given}" if where else message


def _fields_beside(location: tuple[int | str, ...], model: type[BaseModel]) -> Iterable[str]:
    section: Any = model
    for part in location[:-1]:
        if part in section.model_fields:  # else the key or the number of one of several
            annotation = section.model_fields[part].annotation
            section = next(
                t
                for t in (annotation, *get_args(annotation))
                if isinstance(t, type) and issubclass(t, BaseModel)
            )
    return [field.alias or name for name, field in section.model_fields.items()]


def differing_fields(one: Recipe, other: Recipe) -> list[str]:
    """Dotted names of the fields in which two recipes differ, except those that may change between two starts."""
    left, right = _flat(one.model_dump()), _flat(other.model_dump())
    return sorted(
        k
        for k in left.keys() | right.keys()
        if not k.startswith(MAY_CHANGE) and left.get(k) != right.get(k)
    )


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
        )
    return flat
