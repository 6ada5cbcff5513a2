"""The set-up scripts: what they refuse in one line, and that a built Horovod is found again."""

import os
import sys
from pathlib import Path

import pytest
from launch import command

INSTALL = Path(__file__).parents[2] / "swap_hpc" / "install"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CUDA": "11"}, "CUDA=11 is not known; choose CUDA=13 or CUDA=12"),
        ({"HOROVOD_BUILD": "gpu"}, "HOROVOD_BUILD=gpu is not known; choose auto, cpu or nccl"),
        ({"PYTHON": "/nowhere/python3"}, "/nowhere/python3 is missing or not Python 3.10 to 3.13; name one: make setup PYTHON="),
    ],
)
def test_a_wrong_setting_gets_one_line(variables: dict[str, str], message: str, tmp_path: Path) -> None:
    done = command(INSTALL / "setup.sh", variables=variables | {"VENV": str(tmp_path / "venv"), "XDG_CACHE_HOME": str(tmp_path)})
    assert done.code == 1 and done.stderr.count("\n") == 1 and message in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_missing_compiler_gets_one_line(tmp_path: Path) -> None:
    done = command(INSTALL / "horovod.sh", variables={"CXX": "/nowhere/g++", "SWAP_HPC_CACHE": str(tmp_path), "HOROVOD_BUILD": "cpu"})
    assert done.code == 1 and done.stderr.count("\n") == 1
    assert "no C++ compiler (/nowhere/g++): install one (Debian: apt-get install g++)" in done.stderr


def test_a_built_horovod_is_found_again_without_a_compiler() -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swap_hpc"
    if not list(cache.glob("horovod-*/*.whl")):
        pytest.skip(f"no wheel in {cache}: this environment was not made by make setup")
    done = command(INSTALL / "horovod.sh", variables={"CXX": "/nowhere/g++", "SWAP_HPC_CACHE": str(cache)})
    assert done.code == 0, done.stderr
    wheel = Path(done.stdout.strip())
    assert wheel.parent.parent == cache and wheel.suffix == ".whl" and f"cp{sys.version_info[0]}{sys.version_info[1]}" in wheel.name
    depends = (wheel.parent / "depends.txt").read_text()
    assert all(word in depends for word in ("horovod 0.28.1", "Open MPI", "HOROVOD_WITH_MPI=1"))
