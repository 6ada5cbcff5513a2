"""A wheel, built as `python -m build` does, installed away from the checkout: nothing that a command needs was left behind."""

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
    shutil.copytree(
        ROOT / "swap_hpc", source / "swap_hpc", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = command(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        out,
        source,
        timeout=300,
    )
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
    """In an environment that has its dependencies, the built Horovod among them, from this one, but not this checkout."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    done = command(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet", wheel
    )
    assert done.code == 0, done.stderr
    (site / "dependencies.pth").write_text(
        "\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n"
    )
    (tmp_path / "work").mkdir()
    found = command(
        python, "-c", "import swap_hpc; print(swap_hpc.__file__)", cwd=tmp_path / "work"
    )
    assert found.stdout.startswith(str(site)), found.stdout + found.stderr
    program = tmp_path / "env" / "bin" / "swap-hpc"
    assert (
        command(program, "--version", cwd=tmp_path / "work").stdout
        == f"swap_hpc {swap_hpc.__version__}\n"
    )
    assert "cifar10-cpu-table" in command(program, "study", cwd=tmp_path / "work").stdout
    done = command(program, "train", "digits", ranks=2, cwd=tmp_path / "work", timeout=180)
    assert done.code == 0 and (tmp_path / "work" / "runs" / "digits" / "result.json").is_file(), (
        done.stderr
    )
