"""The design, kept where no import contract can hold it: rank branches, light modules, swap.py.

The directions between packages are import-linter's contracts in pyproject.toml.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import swap_hpc

PACKAGE = Path(swap_hpc.__file__).parent

# A branch on the rank around a collective is a hang. These may ask for their rank: what writes
# files, what speaks to a person, and the teams themselves.
MAY_BRANCH = {
    "__main__",
    "parallel.gloo_communicator.GlooCommunicator",
    "parallel.grid.first_then_rest",
    "parallel.grid.of_groups",
    "parallel.teams.Team",
    "run.checkpoint",
    "run.display",
    "run.ending",
    "run.journal",
    "run.watchdog.watching",
}


def modules() -> dict[str, ast.Module]:
    """Every module of the package, parsed; `install` holds programs that nothing imports."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "install":
            name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


def conditions(node: ast.AST) -> list[ast.expr]:
    match node:
        case ast.comprehension():
            return node.ifs
        case ast.If() | ast.IfExp() | ast.While():
            return [node.test]
        case ast.Compare() | ast.BoolOp():
            return [node]
    return []


def asks_for_a_rank(condition: ast.expr) -> bool:
    parts = ast.walk(condition)
    return any(isinstance(part, ast.Attribute) and part.attr == "rank" for part in parts)


def rank_branches(tree: ast.Module) -> set[str]:
    """The top-level functions and classes with a condition that asks for a rank."""
    scopes = [each for each in tree.body if isinstance(each, ast.FunctionDef | ast.ClassDef)]
    return {
        scope.name
        for scope in scopes
        for node in ast.walk(scope)
        if any(asks_for_a_rank(condition) for condition in conditions(node))
    }


def test_only_writers_and_speakers_ask_for_their_rank() -> None:
    branching = {
        f"{name}.{scope}" for name, tree in modules().items() for scope in rank_branches(tree)
    }
    assert "parallel.grid.first_then_rest" in branching  # the check does see one
    unexpected = [
        scope
        for scope in branching
        if scope not in MAY_BRANCH and scope.rpartition(".")[0] not in MAY_BRANCH
    ]
    assert unexpected == []


def test_swap_reads_like_the_paper() -> None:
    assert len((PACKAGE / "swap.py").read_text().splitlines()) <= 60


def test_a_listing_of_the_package_shows_its_architecture() -> None:
    entries = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.*")}
    entries.discard("__pycache__")
    assert len(entries) <= 14, sorted(entries)


@pytest.mark.parametrize("module", ["study.report", "recipe.page", "study.table", "__main__"])
def test_light_modules_load_neither_torch_nor_mpi(module: str) -> None:
    heavy = "{'torch', 'mpi4py', 'horovod', 'nvidia'}"
    code = f"import swap_hpc.{module}, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
