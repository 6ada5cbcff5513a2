"""A wheel built with `python -m build` has everything that the commands need."""

import shutil
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from launch import command

import swap_hpc

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "swap_hpc", source / "swap_hpc", ignore=compiled)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source)
    done = command(*build)
    assert done.code == 0, done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_all_files_of_the_package(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("swap_hpc/")}
    package = ROOT / "swap_hpc"
    wanted = {
        str(path.relative_to(ROOT))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted == inside


def test_it_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    """The environment has this one's dependencies and the built Horovod, but not this checkout."""
    env, work = tmp_path / "env", tmp_path / "work"
    work.mkdir()
    venv.create(env, with_pip=False)
    python = env / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    done = command(*pip, "install", "--no-deps", "--quiet", wheel)
    assert done.code == 0, done.stderr
    site = next((env / "lib").glob("python*/site-packages"))
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    found = command(python, "-c", "import swap_hpc; print(swap_hpc.__file__)", cwd=work)
    assert found.stdout.startswith(str(site)), found.stdout + found.stderr
    program = env / "bin" / "swap-hpc"
    version = command(program, "--version", cwd=work).stdout
    assert version == f"swap_hpc {swap_hpc.__version__}\n"
    assert "cifar10-cpu-table" in command(program, "study", cwd=work).stdout
    done = command(program, "train", "digits", ranks=2, cwd=work)
    assert done.code == 0, done.stderr
    assert (work / "runs" / "digits" / "result.json").is_file()
