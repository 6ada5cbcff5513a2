"""Words for people."""

import textwrap
from collections.abc import Sequence


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it is not one: "1 rank", "4,096 ranks"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def bit_rate(rate: float) -> str:
    """Return bits per second as text of three digits in Gbit/s, or in Mbit/s where they are few."""
    number, unit = (rate / 1e9, "Gbit/s") if rate >= 1e9 else (rate / 1e6, "Mbit/s")
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def shortened(text: str, limit: int) -> str:
    """Return text in one line of at most `limit` characters, cut at the end of a word if longer.

    A first word that is longer than the line is cut in its middle, as `without_middle` does.
    """
    line = " ".join(text.split())
    cut = textwrap.shorten(line, limit, placeholder=" ...")
    return without_middle(line, limit) if cut == "..." else cut


def without_middle(text: str, limit: int) -> str:
    """Return text of at most `limit` characters: a longer one has " ... " in place of its middle.

    Its beginning and its end are both kept, since either may be what a person looks for.
    """
    if len(text) <= limit:
        return text
    kept = limit - 5
    return f"{text[: kept - kept // 2]} ... {text[-(kept // 2) :]}"


def first_few(names: Sequence[str], few: int = 3) -> str:
    """Return the first names of a list and how many follow: "a, b, c and 12 more"."""
    shown = ", ".join(names[:few])
    rest = len(names) - few
    return f"{shown} and {rest:,} more" if rest > 0 else shown
