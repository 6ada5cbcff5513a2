"""The design, kept: imports go downward, heavy dependencies have one place, ranks do not branch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import swap_hpc

PACKAGE = Path(swap_hpc.__file__).parent

# Lowest first: a module imports only those before it.
LAYERS = {
    0: ["errors", "launcher", "schedule", "imports", "recipe", "part", "control", "seeding", "tensors", "kinds"],
    1: [
        "ranks",
        "devices",
        "gradients",
        "data.sampling",
        "data.splits",
        "data.identity",
        "data.shards",
        "data.walk",
        "data.crops",
        "data.encoded",
        "data.pieces",
        "data.decode",
        "data.loader",
        "data.sources",
        "data.own",
        "data",
        "models",
    ],
    2: ["power", "agreement", "averaging", "events", "objective", "job", "evaluation", "optimizers", "fit", "dry_step"],
    3: ["swap"],
    4: ["files", "board", "metrics", "checkpoint", "ending", "watchdog", "lock"],
    5: [
        "figures",
        "report",
        "recipe_page",
        "study",
        "study_report",
        "plan",
        "doctor",
        "prepare",
        "saved",
        "planes",
        "landscape",
        "trajectory",
        "pack",
        "bench.checkpoint",
        "bench.measure",
        "bench.loading",
        "bench.overhead",
        "bench.training",
        "bench.averages",
        "bench.starting",
        "bench.traffic",
        "bench.scaling",
        "bench",
        "bench.__main__",
        "result",
        "adopt",
        "consumer",
        "run",
        "cli",
        "__main__",
    ],
}
ORDER = [name for layer in LAYERS.values() for name in layer]

# Where a dependency may be imported; a folder stands for all in it.
PLACES = {"mpi4py": {"ranks"}, "horovod": {"gradients"}, "nvidia": {"data"}, "torchvision": {"data", "models"}, "typer": {"cli"}}

# Who may ask for its rank: writers, speakers, and one helper.
MAY_BRANCH = {"metrics", "checkpoint", "cli", "ranks.first_then_rest", "ranks.Team"}


def modules() -> dict[str, ast.Module]:
    """Those of the package; install/ holds programs, which nothing imports."""
    paths = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.parent.name != "install"]
    files = {PACKAGE / path: ".".join(path.with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): ast.parse(path.read_text()) for path, name in files.items() if name != "__init__"}


MODULES = modules()


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of what a module imports; of our own package, the modules, not what is in them."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            ours = {name for name in inner if name.removeprefix("swap_hpc.") in MODULES}
            found |= ours or {node.module}
    return found


def test_every_module_has_its_layer() -> None:
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_downward(name: str) -> None:
    ours = {i.removeprefix("swap_hpc.") for i in imports(MODULES[name]) if i.startswith("swap_hpc.")}
    # a package's front door knows the rooms behind it
    allowed = ORDER[: ORDER.index(name)]
    assert ours <= set(allowed), f"{name} imports {sorted(ours - set(allowed))} from its own layer or above"


@pytest.mark.parametrize("package", PLACES)
def test_a_heavy_dependency_has_one_place(package: str) -> None:
    users = {name for name, tree in MODULES.items() if any(i.split(".")[0] == package for i in imports(tree))}
    assert users and {name.split(".")[0] for name in users} <= PLACES[package]


def rank_branches(tree: ast.Module) -> set[str]:
    """Functions (or the module) with a condition that asks for a rank."""
    found = set()
    scopes = [(node.name, node) for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for scope, body in scopes:
        for node in ast.walk(body):
            tests: list[ast.expr] = node.ifs if isinstance(node, ast.comprehension) else []
            if isinstance(node, ast.If | ast.IfExp | ast.While):
                tests = [node.test]
            elif isinstance(node, ast.Compare | ast.BoolOp):
                tests = [node]
            if any(isinstance(part, ast.Attribute) and part.attr == "rank" for test in tests for part in ast.walk(test)):
                found.add(scope)
    return found


def test_only_writers_and_speakers_ask_for_their_rank() -> None:
    branching = {f"{name}.{scope}" for name, tree in MODULES.items() for scope in rank_branches(tree)}
    assert "ranks.first_then_rest" in branching  # the check does see one
    assert {b for b in branching if b not in MAY_BRANCH and b.split(".")[0] not in MAY_BRANCH} == set()


def test_swap_reads_like_the_paper() -> None:
    assert len((PACKAGE / "swap.py").read_text().splitlines()) <= 60


@pytest.mark.parametrize("module", ["swap_hpc.report", "swap_hpc.recipe_page", "swap_hpc.study_report", "swap_hpc.recipe", "swap_hpc.cli"])
def test_light_modules_load_neither_torch_nor_mpi(module: str) -> None:
    code = f"import {module}, sys; print(sorted({{'torch', 'mpi4py', 'horovod', 'nvidia'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
