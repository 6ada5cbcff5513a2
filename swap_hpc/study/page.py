"""The page of studies: every field, from the schema. Imports neither torch nor MPI."""

from pydantic import BaseModel

from swap_hpc.recipe.page import described
from swap_hpc.study.study import Row, Run, Search, Study, load_study, shipped_studies

HEAD = """# The fields of a study

A study is a TOML file: the rows of a table, and the runs that fill it. `swap-hpc study` lists the
shipped ones; [`cifar10-cpu-table.toml`](cifar10-cpu-table.toml) has all parts. A wrong or unknown
field is refused with a list of the valid ones.

This page is generated from the schema in [`study.py`](study.py) by `swap-hpc study --page`.
"""

SECTIONS: dict[str, type[BaseModel]] = {
    "Top of the file": Study,
    "[search]": Search,
    "[runs.NAME]": Run,
    "[[rows]]": Row,
}


def page() -> str:
    """Return the page as Markdown."""
    lines = [HEAD, "## Shipped studies", ""]
    for name, file in shipped_studies().items():
        lines.append(f"- [`{name}`]({file.name}): {load_study(name).title}")
    for heading, section in SECTIONS.items():
        lines += described(f"## {heading}", section)
    return "\n".join(lines) + "\n"
