"""The index of decisions in LOG.md: every line links to an entry of the log."""

import re
from collections import Counter
from pathlib import Path

LOG = (Path(__file__).parents[2] / "LOG.md").read_text(encoding="utf-8")
INDEX, _, ENTRIES = LOG.partition("## Index of decisions\n")[2].partition("\n## ")
LINK = re.compile(r"- \[(?P<decision>.+)\]\(#(?P<anchor>[^)]+)\)")


def anchors(text: str) -> list[str]:
    """Return the anchors that a forge gives to the headings of a Markdown text."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return [heading.replace(" ", "-") for heading in kept]


def test_each_line_of_the_index_is_one_link() -> None:
    lines = [line for line in INDEX.splitlines() if line and not line.startswith("**")]
    assert len(lines) > 100
    assert [line for line in lines if not LINK.fullmatch(line)] == []


def test_each_link_leads_to_an_entry() -> None:
    linked = {link["anchor"] for link in LINK.finditer(INDEX)}
    assert sorted(linked - set(anchors("## " + ENTRIES))) == []


def test_no_two_headings_share_an_anchor() -> None:
    """A forge appends a number to the second one, so that a link would lead to the first."""
    assert [anchor for anchor, count in Counter(anchors(LOG)).items() if count > 1] == []


def test_entries_are_dated_and_the_newest_comes_first() -> None:
    dates = re.findall(r"^## (.{10})", "## " + ENTRIES, flags=re.MULTILINE)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates)
    assert dates == sorted(dates, reverse=True)
