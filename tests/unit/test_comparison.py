"""The tables that show swap_hpc beside other programs are whole, and true of its own column."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from swap_hpc.__main__ import app
from swap_hpc.recipe.schema import Recipe

PAGE = Path(__file__).parents[2] / "swap_hpc" / "bench" / "README.md"
SECTION = PAGE.read_text(encoding="utf-8").partition("## Beside other programs\n")[2]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

# What a field would be called that takes a row out of the table of what is lacking.
NAMES_OF_THE_LACKING = {
    "sharded": "shard",
    "outer optimizer": "outer",
    "synchronised": "sync",
    "recomputed": "activation",
    "by value": "clip_value",
    "distillation": "distil",
}


def rows() -> list[list[str]]:
    """Return the cells of each row, without the heads of the tables."""
    lines = [line for line in SECTION.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0]]


def fields(model: type[BaseModel] = Recipe, section: str = "") -> list[str]:
    """Return the names of all fields of a recipe, with their sections."""
    names = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += fields(kind, f"{section}{name}.")
        else:
            names.append(section + name)
    return names


def test_every_row_has_a_cell_for_every_program() -> None:
    assert len(rows()) >= 30
    assert [row for row in rows() if len(row) != 7 or not all(row)] == []


def test_every_note_is_referred_to_and_exists() -> None:
    notes = re.findall(r"^(\d+)\. ", SECTION, flags=re.MULTILINE)
    referred = {
        number for row in rows() for cell in row for number in re.findall(r"\((\d+)\)", cell)
    }
    assert referred == set(notes)
    assert notes == [str(number) for number in range(1, len(notes) + 1)]


def named() -> list[str]:
    return [name for row in rows() for name in re.findall(r"`(.+?)`", row[1])]


@pytest.mark.parametrize("name", named())
def test_what_our_column_names_exists(name: str) -> None:
    if not name.startswith("swap-hpc "):
        assert name in fields()
        return
    command, *options = name.split()[1:]
    known = {option for parameter in COMMANDS[command].params for option in parameter.opts}
    assert {*options} <= known


@pytest.mark.parametrize(("row", "name"), NAMES_OF_THE_LACKING.items())
def test_what_we_lack_is_no_field(row: str, name: str) -> None:
    ((_, ours, *_),) = [cells for cells in rows() if row in cells[0]]
    assert ours.startswith("no")
    assert [field for field in fields() if name in field] == []
