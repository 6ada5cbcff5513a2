"""The page of recipes: every field, from the schema. Imports neither torch nor MPI."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from swap_hpc.recipe.loading import shipped_recipes
from swap_hpc.recipe.markdown import markdown_table
from swap_hpc.recipe.schema import Recipe

HEAD = """# Recipes

A recipe is a TOML file: what is trained, with what data, for how long. `swap-hpc recipes NAME` shows a shipped one, and
`--set section.field=value` overrides a field of any. A wrong or unknown field is refused, with what is valid.

This page is made of the schema in [`schema.py`](schema.py): `swap-hpc recipes --page`.
"""


def page() -> str:
    """Markdown."""
    lines = [HEAD, "## The shipped ones", ""]
    lines += [
        f"- [`{name}`]({file.name}): {_first_line(file)}"
        for name, file in shipped_recipes().items()
    ]
    top = {name: field for name, field in Recipe.model_fields.items() if not _section(field)}
    lines += ["", "## The top of the file", "", _table(top, Recipe)]
    for name, field in Recipe.model_fields.items():
        if section := _section(field):
            lines += [
                "",
                f"## [{name}]",
                "",
                f"{(section.__doc__ or '').strip()}",
                "",
                _table(section.model_fields, section),
            ]
    return "\n".join(lines) + "\n"


def _first_line(file: Path) -> str:
    return file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _table(fields: dict[str, FieldInfo], model: type[BaseModel]) -> str:
    schema = model.model_json_schema()["properties"]
    rows = [
        (
            f"`{name}`",
            _kind(schema[name]),
            _default(field),
            " ".join((field.description or "").split()),
        )
        for name, field in fields.items()
    ]
    return markdown_table(("field", "type", "default", "what"), rows)


def _kind(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"] if each.get("type") != "null")
    if schema.get("type") == "array":
        return "`[epoch, value]` pairs" if "items" in schema else "two numbers"
    name = {
        "integer": "integer",
        "number": "number",
        "boolean": "true or false",
        "string": "text",
        "object": "table",
    }[schema["type"]]
    low, high = schema.get("minimum"), schema.get("maximum")
    if high is not None:
        return (
            f"{name} from {low if low is not None else schema.get('exclusiveMinimum')} to {high:g}"
        )
    return (
        f"{name}, at least {low:g}"
        if low is not None
        else f"{name} above {schema['exclusiveMinimum']:g}"
        if "exclusiveMinimum" in schema
        else name
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return f"`{[round(each, 3) for each in value]}`"
    return (
        f"`{str(value).lower() if isinstance(value, bool) else value}`"
        if not isinstance(value, dict)
        else "none"
    )
