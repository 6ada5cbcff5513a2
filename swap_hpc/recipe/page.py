"""The page of recipes: every field, from the schema. Imports neither torch nor MPI."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from swap_hpc.recipe.loading import shipped_recipes
from swap_hpc.recipe.markdown import markdown_table
from swap_hpc.recipe.schema import Recipe
from swap_hpc.recipe.section import models_in

HEAD = """# Recipes

A recipe is a TOML file: which model is trained, on what data, for how long.
`swap-hpc recipes NAME` shows a shipped one, and `--set section.field=value` overrides a field of
any recipe. A wrong or unknown field is refused with a list of the valid ones.

A field that has no effect on the run at hand is refused by name, too. Four kinds are accepted:

- what belongs to a phase that is skipped (`epochs = 0`);
- `cudnn_benchmark` and `deterministic` on a CPU, since recipes travel between machines;
- `[batchnorm]`, `large_batch.batchnorm_batch_size` and `channels_last` for a model without batch
  norm, or without convolutions: the run's first lines say that they have no effect;
- `checkpoint.min_seconds` with `checkpoint.epochs = 0`: likewise.

This page is generated from [`schema.py`](schema.py) and the modules of its sections by
`swap-hpc recipes --page`.
"""

TYPES = {
    "integer": "integer",
    "number": "number",
    "boolean": "true or false",
    "string": "text",
    "object": "table",
}


def page() -> str:
    """Return the page as Markdown."""
    fields = Recipe.model_fields
    top = {name: field for name, field in fields.items() if not _section(field)}
    lines = [HEAD, "## Shipped recipes", ""]
    for name, file in shipped_recipes().items():
        lines.append(f"- [`{name}`]({file.name}): {_first_line(file)}")
    lines += ["", "## Top of the file", "", _table(top, Recipe)]
    shown: set[type[BaseModel]] = set()
    for name, field in fields.items():
        if section := _section(field):
            lines += described(f"## [{name}]", section)
            for heading, table in _tables_within(name, section):
                if table not in shown:  # both phases have the same shapes
                    shown.add(table)
                    lines += described(f"### {heading}", table)
    return "\n".join(lines) + "\n"


def described(heading: str, section: type[BaseModel]) -> list[str]:
    """Return a heading, what the section is, and the table of its fields."""
    return ["", heading, "", _one_line(section.__doc__), "", _table(section.model_fields, section)]


def _tables_within(name: str, section: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the heading and the model of each table that is the value of a section's field."""
    for inner, field in section.model_fields.items():
        for table in models_in(field.annotation):
            yield _heading(name, inner, table), table


def _heading(section: str, field: str, table: type[BaseModel]) -> str:
    if shape := table.model_fields.get("shape"):
        (value,) = get_args(shape.annotation)
        return f'{field} = {{ shape = "{value}", ... }}'
    return f"[[{section}.{field}]]"


def _first_line(file: Path) -> str:
    return file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a section, or None for a plain field."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _table(fields: dict[str, FieldInfo], model: type[BaseModel]) -> str:
    schema = model.model_json_schema()["properties"]
    rows = [
        (f"`{name}`", _kind(schema[name]), _default(field), _one_line(field.description))
        for name, field in ((field.alias or name, field) for name, field in fields.items())
        if name != "shape"  # the heading has it
    ]
    return markdown_table(("field", "type", "default", "meaning"), rows)


def _kind(schema: dict[str, Any]) -> str:
    """Return the type of a field and its bounds, from its JSON schema."""
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "$ref" in schema:
        return "table"
    if either := schema.get("anyOf") or schema.get("oneOf"):
        kinds = (_kind(each) for each in either if each.get("type") != "null")
        return " or ".join(dict.fromkeys(kinds))
    if schema["type"] == "array":
        # A pair of numbers has "prefixItems" instead of "items".
        items = schema.get("items")
        if items is None:
            return "two numbers"
        if "prefixItems" not in items:
            return f"list of {_kind(items).replace(' or ', 's or ')}s"
        texts = all(each.get("type") == "string" for each in items["prefixItems"])
        return "list of pairs of texts" if texts else "`[epoch, value]` pairs"
    name = TYPES[schema["type"]]
    low, above, high = (schema.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
    if high is not None:
        return f"{name} from {above if low is None else low} to {high:g}"
    if low is not None:
        return f"{name}, at least {low:g}"
    if above is not None:
        return f"{name} above {above:g}"
    return name


def _plain(values: tuple[Any, ...]) -> list[Any]:
    """Return values as TOML has them."""
    return [v.model_dump() if isinstance(v, BaseModel) else v for v in values]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value == "" or isinstance(value, dict):
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        parts = [round(v, 3) if isinstance(v, float) else v for v in _plain(value)]
        return f"`{parts}`"
    return f"`{value}`"
