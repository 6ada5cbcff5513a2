"""What is wrong with a TOML file, in one line, from what pydantic found."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from swap_hpc.recipe.section import models_in
from swap_hpc.recipe.wording import count, without_middle

LONGEST = 80  # characters of a value that was given

# Kinds of errors -> what the field needs; {} stands for what pydantic knows of the error.
NEEDS = {
    "bool_": "true or false",
    "int_": "a whole number",
    "float_": "a number",
    "finite_number": "a finite number",
    "string_": "a text",
    "path_type": "a path, as a text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a table",
    "model_": "a table",
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "less than {lt:g}",
}

Error = dict[str, Any]
Location = tuple[int | str, ...]


def complaints(error: ValidationError, model: type[BaseModel]) -> str:
    """Return all that is wrong with a file in one line, for its author.

    Args:
        error: What pydantic found.
        model: The model of the whole file; it names the valid fields beside an unknown one.
    """
    found: list[Error] = [dict(each) for each in error.errors()]
    # A list whose items are wrong counts as empty for pydantic, which it is not.
    found = [each for each in found if not (_is_about_length(each) and _has_inner(each, found))]
    lines = []
    for _, same in groupby(found, key=lambda each: _choice(each["loc"], model)):
        lines += _of_one_choice(list(same), model)
    return "; ".join(dict.fromkeys(lines))


def _is_about_length(error: Error) -> bool:
    return error["type"] in ("too_short", "too_long")


def _has_inner(error: Error, others: list[Error]) -> bool:
    depth = len(error["loc"])
    return any(len(o["loc"]) > depth and o["loc"][:depth] == error["loc"] for o in others)


def _parts(location: Location, model: type[BaseModel]) -> Iterator[tuple[str, int | str, Any]]:
    """Yield each part of a location: field, key, item or choice of a union, its name, its type."""
    kind: Any = model
    for part in location:
        fields = _fields_of(kind)
        if isinstance(part, int):
            yield "item", part, kind
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
            yield "key", part, kind
        elif part in fields:
            kind = fields[part]
            yield "field", part, kind
        else:
            yield "choice", part, kind


def _fields_of(kind: Any) -> dict[str, Any]:
    """Return name -> type of the fields of all models that a type names."""
    return {
        name: field.annotation
        for model in models_in(kind)
        for own, field in model.model_fields.items()
        for name in (own, field.alias or own)
    }


def _choice(location: Location, model: type[BaseModel]) -> Location:
    """Return the location of the field that an error is about, up to the choice of a union."""
    for number, (what, *_) in enumerate(_parts(location, model)):
        if what == "choice":
            return location[:number]
    return location


def _of_one_choice(errors: list[Error], model: type[BaseModel]) -> list[str]:
    """Return the lines about one field; of a union, those of the form that was meant."""
    depth = len(_choice(errors[0]["loc"], model)) + 1
    forms = {each["loc"][:depth] for each in errors}
    if len(forms) == 1 or errors[0]["type"] == "extra_forbidden":
        return [_line(each, model) for each in errors]
    deepest = max(errors, key=lambda each: len(each["loc"]))
    if len(deepest["loc"]) > depth:
        meant = deepest["loc"][:depth]
        return [_line(each, model) for each in errors if each["loc"][:depth] == meant]
    either = " or ".join(dict.fromkeys(_message(each).removeprefix("needs ") for each in errors))
    place = _place(errors[0]["loc"][: depth - 1], model)
    return [f"{place}: needs {either}{_given(errors[0])}"]


def _line(error: Error, model: type[BaseModel]) -> str:
    location = error["loc"]
    if error["type"] == "extra_forbidden":
        valid = ", ".join(_fields_beside(location, model))
        return f"unknown field {_place(location, model)}; valid here: {valid}"
    if error["type"] == "missing":
        if isinstance(location[-1], int):  # of a list of a fixed length
            return f"{_place(location[:-1], model)}: has too few items{_given(error)}"
        return f"{_place(location, model)} is missing"
    place, message = _place(location, model), _message(error)
    if not place:
        return message
    # of a section whose fields do not fit together the message tells enough
    is_of_section = error["type"] == "value_error" and _is_section(location, model)
    return f"{place}: {message}{'' if is_of_section else _given(error)}"


def _is_section(location: Location, model: type[BaseModel]) -> bool:
    *_, (_, _, kind) = _parts(location, model)
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _place(location: Location, model: type[BaseModel]) -> str:
    """Return a location in words: "refine.learning_rate (item 2 of item 1)", counted from 1."""
    names, items = [], []
    for number, (what, part, _) in enumerate(_parts(location, model)):
        if what == "item":
            items.append(f"item {int(part) + 1}")
        elif what != "choice" or (number == len(location) - 1 and not str(part).startswith("<")):
            names.append(str(part))
    place = ".".join(names)
    return f"{place} ({' of '.join(reversed(items))})" if items else place


def _message(error: Error) -> str:
    """Return what is wrong, without the place and what was given."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "literal_error":
        return "needs " + context["expected"].replace("'", '"')
    if kind == "too_short":
        return f"needs at least {count(context['min_length'], 'item')}"
    if kind == "too_long":
        return f"needs at most {count(context['max_length'], 'item')}"
    for known, needed in NEEDS.items():
        if kind == known or (known.endswith("_") and kind.startswith(known)):
            return "needs " + needed.format(**context)
    return error["msg"].removeprefix("Value error, ").replace("Input should be", "needs")


def _given(error: Error) -> str:
    return f" (given: {without_middle(in_toml(error['input']), LONGEST)})"


def in_toml(value: Any) -> str:
    """Return a value about as a TOML file has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(in_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {in_toml(each)}' for key, each in value.items())}}}"
    return str(value)


def _fields_beside(location: Location, model: type[BaseModel]) -> list[str]:
    """Return the names of all fields in the section of the field at `location`."""
    section: Any = model
    for part in location[:-1]:
        if part not in section.model_fields:
            continue  # the key of a dictionary, or the index of a tuple
        models = models_in(section.model_fields[part].annotation)
        tagged = [each for each in models if f"<{each.__name__}>" in location]
        section = (tagged or models)[0]
    return [field.alias or name for name, field in section.model_fields.items()]
