"""The set-up scripts: what they refuse before anything is downloaded, what they notice, and that a built Horovod is found again."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch import BIN, Finished, command

INSTALL = Path(__file__).parents[2] / "swap_hpc" / "install"
MADE_WITH = BIN.parent / "swap_hpc.made_with"


def set_up(tmp: Path, **variables: str) -> Finished:
    """A set-up into a new folder, with an empty cache, by the Python that runs the tests."""
    base: str = sys._base_executable  # type: ignore[attr-defined]
    fresh = {
        "PYTHON": base,
        "VENV": str(tmp / "venv"),
        "XDG_CACHE_HOME": str(tmp / "cache"),
        "PATH": outside(),
    }
    return command(INSTALL / "setup.sh", variables=fresh | variables)


def outside() -> str:
    """The PATH without this environment."""
    return ":".join(part for part in os.environ["PATH"].split(":") if part != str(BIN))


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def refused(done: Finished, *messages: str) -> None:
    """Ends at once with one line for each message, in this order."""
    lines = done.stderr.splitlines()
    assert done.code == 1 and len(lines) == len(messages), done.stderr
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith("swap_hpc setup: ") and message in line
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CUDA": "11"}, "CUDA=11 is not known; choose CUDA=13 or CUDA=12"),
        ({"HOROVOD_BUILD": "gpu"}, "HOROVOD_BUILD=gpu is not known; choose auto, cpu or nccl"),
        (
            {"PYTHON": "/nowhere/python3"},
            "/nowhere/python3 is missing or not Python 3.10 to 3.13; name one: make setup PYTHON=",
        ),
        (
            {"CXX": "/nowhere/g++"},
            "no C++ compiler (/nowhere/g++): install one (Debian: apt-get install g++), or load the site's module",
        ),
    ],
)
def test_a_wrong_setting_gets_one_line(
    variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    refused(set_up(tmp_path, **variables), message)
    assert list(tmp_path.iterdir()) == []


def test_an_old_compiler_gets_one_line(tmp_path: Path) -> None:
    """This host's compiler, held to the language of 2017, as gcc 9 is."""
    old = program(
        tmp_path / "g++-9",
        'case "$*" in *--version*) exec g++ --version ;; esac\nexec g++ "$@" -std=c++17',
    )
    refused(
        set_up(tmp_path, CXX=str(old)),
        "cannot compile C++20, which torch's headers want: load or install gcc 11, clang 16 or a newer",
    )


def test_a_python_without_venv_or_headers_gets_a_line_for_each(tmp_path: Path) -> None:
    """As Debian's python3 is without python3-venv and python3-dev. With no compiler there are three lines."""
    (tmp_path / "bare" / "include").mkdir(parents=True)
    (tmp_path / "bare" / "ensurepip.py").write_text("raise ModuleNotFoundError(name='ensurepip')\n")
    (tmp_path / "bare" / "sitecustomize.py").write_text(
        f"import sysconfig\n\nbefore = sysconfig.get_paths()\n"
        f"sysconfig.get_paths = lambda *_: before | {{'include': '{tmp_path}/bare/include'}}\n"
    )
    done = set_up(tmp_path, PYTHONPATH=str(tmp_path / "bare"), CXX="/nowhere/g++")
    refused(
        done,
        "Python's module venv is missing: install it (Debian: apt-get install python3-venv)",
        f"Python's headers are missing (no {tmp_path}/bare/include/Python.h): install them (Debian: apt-get install python3-dev)",
        "no C++ compiler (/nowhere/g++)",
    )


NEEDED = "awk bash cat cksum cut df diff dirname du find getconf grep head mktemp readlink realpath rm sed sort tail uname"


def path_of(folder: Path, names: str) -> str:
    """A PATH of these programs alone."""
    folder.mkdir()
    for name in names.split():
        found = shutil.which(name)
        assert found, name
        (folder / name).symlink_to(found)
    return str(folder)


def test_a_missing_make_gets_one_line(tmp_path: Path) -> None:
    done = set_up(tmp_path, PATH=path_of(tmp_path / "bin", f"{NEEDED} g++ as"))
    refused(done, "no make: install it (Debian: apt-get install make)")


def test_an_mpi_without_its_header_gets_one_line(tmp_path: Path) -> None:
    """As on a host with an MPI's programs and without its development package."""
    program(tmp_path / "site" / "mpicc", 'exec gcc "$@"')
    program(tmp_path / "site" / "mpicxx", 'exec g++ "$@"')
    done = set_up(tmp_path, PATH=f"{tmp_path}/site:{outside()}", CPATH="", C_INCLUDE_PATH="")
    refused(
        done,
        f"{tmp_path}/site/mpicc finds no mpi.h: install MPI's development package (Debian: apt-get install libopenmpi-dev",
    )


def test_a_toolkit_that_is_wished_for_and_missing_gets_one_line(tmp_path: Path) -> None:
    """Of the two CUDA versions one has no toolkit here, or neither has."""
    found = (
        subprocess.run(
            ["/usr/local/cuda/bin/nvcc", "--version"], capture_output=True, text=True
        ).stdout
        if _nvcc()
        else ""
    )
    cuda = "13" if "release 12." in found else "12"
    variables = {"HOROVOD_BUILD": "nccl", "CUDA": cuda, "CUDA_HOME": "", "PATH": outside()}
    refused(
        set_up(tmp_path, **variables),
        f"HOROVOD_BUILD=nccl needs the CUDA {cuda} toolkit (nvcc): load its module, or set CUDA_HOME",
    )


def _nvcc() -> bool:
    return Path("/usr/local/cuda/bin/nvcc").exists()


def test_too_small_a_disk_gets_one_line(small_disk: Path, tmp_path: Path) -> None:
    alone = set_up(tmp_path, VENV=str(small_disk / "new" / "venv"))
    room = "make room, or name another place"
    refused(alone, f"{small_disk} has 0 GiB free, and about 7 are needed there: {room} (VENV=)")
    both = set_up(tmp_path, VENV=str(small_disk / "venv"), TMPDIR=str(small_disk))
    refused(
        both,
        f"{small_disk} has 0 GiB free, and about 10 are needed there: {room} (VENV= and TMPDIR=)",
    )
    assert list(small_disk.iterdir()) == []


def shell(line: str, **variables: str) -> str:
    """What a function of the scripts prints."""
    done = command(
        "bash", "-c", f'set -euo pipefail; . "{INSTALL}/common.sh"; {line}', variables=variables
    )
    assert done.code == 0, done.stderr
    return done.stdout.strip()


def test_the_mpi_is_known_by_its_header() -> None:
    """The wrapper's header says what the library says of itself."""
    from swap_hpc.parallel.mpi import mpi_library

    name = shell(f'mpi_version "{_mpicc()}"')
    assert re.sub(r" v(?=\d)", " ", mpi_library()) == name and re.fullmatch(
        r"(Open MPI|MPICH) \d+\.\d+(\.\d+)?\S*", name
    )


def _mpicc() -> str:
    site = re.search(r"^MPI=(.*)$", MADE_WITH.read_text(), flags=re.MULTILINE)
    return str(BIN / "mpicc") if site is None or site[1] == "wheel" else site[1]


def test_the_mpi_is_told_by_what_its_header_says(tmp_path: Path) -> None:
    """Of descendants that cannot be installed here, too: only what the header says is made up."""
    header = tmp_path / "include" / "mpi.h"
    program(tmp_path / "bin" / "mpicc", f'exec gcc -I "{header.parent}" "$@"')
    header.parent.mkdir()
    for text, name in (
        (
            "#define OMPI_MAJOR_VERSION 4\n#define OMPI_MINOR_VERSION 1\n#define OMPI_RELEASE_VERSION 4\n",
            "Open MPI 4.1.4",
        ),
        ('#define MPICH_VERSION "4.0.2"\n', "MPICH 4.0.2"),
        ('#define MPICH_VERSION "3.4a2"\n#define I_MPI_VERSION "2021.9.0"\n', "Intel MPI 2021.9.0"),
        ("", "an MPI of version 3.1"),
    ):
        header.write_text(f"#define MPI_VERSION 3\n#define MPI_SUBVERSION 1\n{text}")
        assert shell(f'mpi_version "{tmp_path}/bin/mpicc"') == name
        assert shell(f'mpi_identity "{tmp_path}/bin/mpicc"') == f"{name} ({tmp_path}/bin/mpicc)"


def test_another_mpi_behind_the_same_wrapper_is_noticed(tmp_path: Path) -> None:
    """As after `update-alternatives --config mpi`, or an update. A complete environment is left alone until then."""
    header, venv = tmp_path / "include" / "mpi.h", tmp_path / "venv"
    program(tmp_path / "bin" / "mpicc", f'exec gcc -I "{header.parent}" "$@"')
    program(tmp_path / "bin" / "mpicxx", 'exec g++ "$@"')
    header.parent.mkdir()
    says = "#define MPI_VERSION 3\n#define MPI_SUBVERSION 1\n#define MPICH_VERSION"
    header.write_text(f'{says} "4.0.2"\n')
    base: str = sys._base_executable  # type: ignore[attr-defined]
    variables = {
        "PYTHON": base,
        "VENV": str(venv),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "CXX": "/nowhere/g++",
    }
    variables["PATH"] = f"{tmp_path}/bin:{outside()}"
    first = command(
        "bash", "-x", INSTALL / "setup.sh", variables=variables
    )  # ends for want of a compiler, and tells what it would write
    (wanted,) = re.findall(r"^\+ wanted='(.*?)'$", first.stderr, flags=re.MULTILINE | re.DOTALL)
    program(venv / "bin" / "swap-hpc", "exit 1")
    (venv / "swap_hpc.stamp").write_text(wanted)
    (venv / "swap_hpc.made_with").write_text(
        f"{wanted}\nbase: {wanted.splitlines()[6].rpartition(' ')[0]}\n"
    )
    same = command(INSTALL / "setup.sh", variables=variables)
    assert (same.code, same.stdout, same.stderr) == (0, "", "")
    header.write_text(f'{says} "4.0.3"\n')
    refused(
        command(INSTALL / "setup.sh", variables=variables), "no C++ compiler (/nowhere/g++)"
    )  # it was going to make it anew


def test_the_environments_packages_fit_together() -> None:
    done = command(sys.executable, "-m", "pip", "check")
    assert (done.code, done.stdout) == (0, "No broken requirements found.\n"), done.stdout


def test_horovod_with_nccl_is_for_hosts_with_a_gpu_or_a_wish() -> None:
    here = shell("gpu_here && echo yes || echo no") == "yes"
    automatic = "nccl" if here else "cpu"
    for build, toolkit, expected in (
        ("auto", "/x", automatic),
        ("auto", "", "cpu"),
        ("cpu", "/x", "cpu"),
        ("nccl", "/x", "nccl"),
    ):
        assert shell(f'horovod_kind {build} "{toolkit}"') == expected


def test_a_missing_compiler_gets_one_line_where_horovod_has_to_be_built(tmp_path: Path) -> None:
    done = command(
        INSTALL / "horovod.sh",
        variables={"CXX": "/nowhere/g++", "SWAP_HPC_CACHE": str(tmp_path), "HOROVOD_BUILD": "cpu"},
    )
    refused(done, "no C++ compiler (/nowhere/g++): install one (Debian: apt-get install g++)")


def kept_wheel(**variables: str) -> Path:
    """The Horovod of this environment, from the cache, without a compiler."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swap_hpc"
    done = command(
        INSTALL / "horovod.sh",
        variables={"CXX": "/nowhere/g++", "SWAP_HPC_CACHE": str(cache)} | variables,
    )
    if "no C++ compiler" in done.stderr:
        pytest.skip(f"no wheel of it in {cache}: this environment was not made by make setup")
    assert done.code == 0, done.stderr
    return Path(done.stdout.strip())


def test_a_built_horovod_is_found_again_without_a_compiler() -> None:
    wheel = kept_wheel()
    assert wheel.suffix == ".whl" and f"cp{sys.version_info[0]}{sys.version_info[1]}" in wheel.name
    depends = (wheel.parent / "depends.txt").read_text()
    assert all(
        word in depends
        for word in (
            "horovod 0.28.1 ",
            f"torch {_version('torch')} ",
            shell(f'mpi_identity "{_mpicc()}"'),
        )
    )


def test_a_built_horovod_is_found_again_without_any_compiler(tmp_path: Path) -> None:
    """As on a node without gcc, where a bundle brings the wheel: the wrapper cannot ask its compiler what its header says."""
    if _mpicc() != str(BIN / "mpicc"):
        pytest.skip("a site's mpi.h lies where only its wrapper knows")
    path = path_of(tmp_path / "bin", NEEDED)
    wheel = kept_wheel()
    tried = command(
        "env",
        f"PATH={BIN}:{path}",
        INSTALL / "horovod.sh",
        variables={"SWAP_HPC_CACHE": str(wheel.parents[1])},
    )
    assert (tried.code, tried.stdout.strip()) == (0, str(wheel)), tried.stderr
    assert not shutil.which("gcc", path=f"{BIN}:{path}") and not shutil.which(
        "cc", path=f"{BIN}:{path}"
    )


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package).partition("+")[0]


def test_a_horovod_for_cpus_links_no_cuda_library(tmp_path: Path) -> None:
    """On a host with a toolkit, too, which Horovod's own build would take."""
    subprocess.run(
        [sys.executable, "-m", "zipfile", "-e", kept_wheel(HOROVOD_BUILD="cpu"), tmp_path],
        check=True,
    )
    (library,) = tmp_path.glob("horovod/torch/*.so")
    dynamic = subprocess.run(
        ["readelf", "--dynamic", library], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "libtorch_cpu.so" in needed and any(name.startswith("libmpi") for name in needed)
    assert [
        name for name in needed if re.search("cuda|cudart|nccl|nvrtc|nvtx|nvToolsExt|cublas", name)
    ] == []
    symbols = subprocess.run(
        ["readelf", "--dyn-syms", "--wide", library], capture_output=True, text=True, check=True
    ).stdout
    assert " UND " in symbols and not re.search(r"UND (cuda|cu[A-Z]|nccl)\w+", symbols)
