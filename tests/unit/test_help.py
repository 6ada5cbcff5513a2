"""The help of a command explains each of its arguments and options."""

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from swap_hpc.__main__ import app

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_parameter_is_explained(name: str) -> None:
    shown = " ".join(CliRunner().invoke(app, [name, "--help"]).output.split())
    explained = {parameter.name: parameter.help for parameter in COMMANDS[name].params}
    assert all(explained.values()), explained
    assert [text for text in explained.values() if " ".join(text.split()) not in shown] == []
