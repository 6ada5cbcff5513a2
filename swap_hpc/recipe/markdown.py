"""Markdown tables, for the page of recipes and for the reports of the packages above."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of text cells: columns padded to one width, numbers left as written."""
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)
