"""The parts of pages that scripts make are those that the code gives today."""

import inspect
from pathlib import Path
from typing import get_args

import pytest
from pages import api, grid

import swap_hpc
from swap_hpc.train.events import Event


def test_the_api_section_is_made_of_the_code() -> None:
    page = api.PAGE.read_text(encoding="utf-8")
    assert page == api.with_section(page), "make pages"


def test_every_public_name_and_every_event_is_in_the_api_section() -> None:
    shown = {name for names in api.SECTIONS.values() for name in names}
    assert {f"swap_hpc:{name}" for name in swap_hpc.__all__} <= shown
    assert {f"swap_hpc.train.events:{kind.__name__}" for kind in get_args(Event)} <= shown


def test_the_drawing_is_that_of_its_script(tmp_path: Path) -> None:
    grid.draw(tmp_path / "grid.svg")
    assert (tmp_path / "grid.svg").read_bytes() == grid.FILE.read_bytes(), "make pages"


def example(batches: "list[int]", *rates: float, size: int = 2) -> "str | None":
    """Do something.

    Some <text> and `<code>`.

    Args:
        batches: what it takes,
            on two lines.
        size: in pixels.

    Returns:
        The `<sum>`, or None: a text.
    """


MARKDOWN = """Do something.

Some &lt;text> and `<code>`.

Args:

- `batches`: what it takes, on two lines.
- `size`: in pixels.

Returns: The `<sum>`, or None: a text."""


def test_a_docstring_becomes_markdown() -> None:
    doc = inspect.getdoc(example)
    assert doc is not None and api._markdown(doc) == MARKDOWN


@pytest.mark.parametrize("line", [api.LINE, 20])
def test_a_signature_is_that_of_the_source(line: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "LINE", line)
    signature = api._signature("example", example)
    expected = "example(batches: list[int], *rates: float, size: int = 2) -> str | None"
    assert " ".join(signature.split()).replace("( ", "(").replace(", )", ")") == expected
