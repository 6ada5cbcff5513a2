"""The set-up scripts: what they refuse before any download, and the Horovod they find again."""

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
    """Run a set-up into a new folder, with an empty cache and the Python that runs the tests."""
    base: str = sys._base_executable  # type: ignore[attr-defined]
    fresh = {
        "PYTHON": base,
        "VENV": str(tmp / "venv"),
        "XDG_CACHE_HOME": str(tmp / "cache"),
        "PATH": outside(),
    }
    return command(INSTALL / "setup.sh", variables=fresh | variables)


def outside() -> str:
    """Return the PATH without this environment."""
    return ":".join(part for part in os.environ["PATH"].split(":") if part != str(BIN))


def program(path: Path, text: str) -> Path:
    """Write an executable bash script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def refused(done: Finished, *messages: str) -> None:
    """Check that a command printed one line for each message, in this order, and nothing else."""
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
            "no C++ compiler (/nowhere/g++): install one (Debian: apt-get install g++), "
            "or load the site's module",
        ),
    ],
)
def test_a_wrong_setting_gets_one_line(
    variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    refused(set_up(tmp_path, **variables), message)
    assert list(tmp_path.iterdir()) == []


def test_an_old_compiler_gets_one_line(tmp_path: Path) -> None:
    """This host's compiler is limited to C++17, as gcc 9 is."""
    script = 'case "$*" in *--version*) exec g++ --version ;; esac\nexec g++ "$@" -std=c++17'
    old = program(tmp_path / "g++-9", script)
    refused(
        set_up(tmp_path, CXX=str(old)),
        "cannot compile C++20, which torch's headers need: "
        "load or install gcc 11, clang 16 or a newer",
    )


def test_a_python_without_venv_or_headers_gets_a_line_for_each(tmp_path: Path) -> None:
    """So it is on Debian without python3-venv and python3-dev. A missing compiler adds a line."""
    bare = tmp_path / "bare"
    (bare / "include").mkdir(parents=True)
    (bare / "ensurepip.py").write_text("raise ModuleNotFoundError(name='ensurepip')\n")
    (bare / "sitecustomize.py").write_text(
        f"import sysconfig\n\nbefore = sysconfig.get_paths()\n"
        f"sysconfig.get_paths = lambda *_: before | {{'include': '{bare}/include'}}\n"
    )
    done = set_up(tmp_path, PYTHONPATH=str(bare), CXX="/nowhere/g++")
    refused(
        done,
        "Python's module venv is missing: install it (Debian: apt-get install python3-venv)",
        f"Python's headers are missing (no {bare}/include/Python.h): "
        "install them (Debian: apt-get install python3-dev)",
        "no C++ compiler (/nowhere/g++)",
    )


# The programs that the set-up scripts call before they download anything.
NEEDED = (
    "awk bash cat cksum cut df diff dirname du find getconf grep head mktemp readlink realpath"
    " rm sed sort tail uname"
)


def path_of(folder: Path, names: str) -> str:
    """Return a PATH with these programs alone."""
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
    """So it is on a host with an MPI's programs but without its development package."""
    program(tmp_path / "site" / "mpicc", 'exec gcc "$@"')
    program(tmp_path / "site" / "mpicxx", 'exec g++ "$@"')
    done = set_up(tmp_path, PATH=f"{tmp_path}/site:{outside()}", CPATH="", C_INCLUDE_PATH="")
    refused(
        done,
        f"{tmp_path}/site/mpicc finds no mpi.h: install MPI's development package "
        "(Debian: apt-get install libopenmpi-dev",
    )


def test_a_missing_toolkit_that_was_asked_for_gets_one_line(tmp_path: Path) -> None:
    """CUDA 12 or CUDA 13 is chosen, whichever has no toolkit on this host."""
    nvcc = Path("/usr/local/cuda/bin/nvcc")
    cuda = "12"
    if nvcc.exists():
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        cuda = "13" if "release 12." in version else "12"
    variables = {"HOROVOD_BUILD": "nccl", "CUDA": cuda, "CUDA_HOME": "", "PATH": outside()}
    refused(
        set_up(tmp_path, **variables),
        f"HOROVOD_BUILD=nccl needs the CUDA {cuda} toolkit (nvcc): "
        "load its module, or set CUDA_HOME",
    )


def test_too_small_a_disk_gets_one_line(small_disk: Path, tmp_path: Path) -> None:
    alone = set_up(tmp_path, VENV=str(small_disk / "new" / "venv"))
    room = "free some space, or choose another place"
    refused(alone, f"{small_disk} has 0 GiB free, but about 7 are needed: {room} (VENV=)")
    both = set_up(tmp_path, VENV=str(small_disk / "venv"), TMPDIR=str(small_disk))
    refused(
        both,
        f"{small_disk} has 0 GiB free, but about 10 are needed: {room} (VENV= and TMPDIR=)",
    )
    assert list(small_disk.iterdir()) == []


def shell(line: str, **variables: str) -> str:
    """Return what a line of bash prints that calls the functions of common.sh."""
    script = f'set -euo pipefail; . "{INSTALL}/common.sh"; {line}'
    done = command("bash", "-c", script, variables=variables)
    assert done.code == 0, done.stderr
    return done.stdout.strip()


def test_the_mpi_is_known_by_its_header() -> None:
    """The wrapper's header and the library that is loaded report the same version."""
    from swap_hpc.parallel.mpi import mpi_library

    name = shell(f'mpi_version "{_mpicc()}"')
    assert re.sub(r" v(?=\d)", " ", mpi_library()) == name
    assert re.fullmatch(r"(Open MPI|MPICH) \d+\.\d+(\.\d+)?\S*", name)


def _mpicc() -> str:
    """Return the compiler wrapper of the MPI that this environment was made for."""
    site = re.search(r"^MPI=(.*)$", MADE_WITH.read_text(), flags=re.MULTILINE)
    return str(BIN / "mpicc") if site is None or site[1] == "wheel" else site[1]


HEADERS = [
    (
        "OMPI_MAJOR_VERSION 4\n#define OMPI_MINOR_VERSION 1\n#define OMPI_RELEASE_VERSION 4",
        "Open MPI 4.1.4",
    ),
    ('MPICH_VERSION "4.0.2"', "MPICH 4.0.2"),
    ('MPICH_VERSION "3.4a2"\n#define I_MPI_VERSION "2021.9.0"', "Intel MPI 2021.9.0"),
    ("NOTHING_ELSE", "an MPI of version 3.1"),
]


@pytest.mark.parametrize(("macros", "name"), HEADERS)
def test_every_mpi_is_known_by_its_header(macros: str, name: str, tmp_path: Path) -> None:
    """The headers are made up, because descendants of MPICH cannot be installed here."""
    header, mpicc = tmp_path / "include" / "mpi.h", tmp_path / "bin" / "mpicc"
    program(mpicc, f'exec gcc -I "{header.parent}" "$@"')
    header.parent.mkdir()
    header.write_text(f"#define MPI_VERSION 3\n#define MPI_SUBVERSION 1\n#define {macros}\n")
    assert shell(f'mpi_version "{mpicc}"') == name
    assert shell(f'mpi_identity "{mpicc}"') == f"{name} ({mpicc})"


def test_another_mpi_behind_the_same_wrapper_is_noticed(tmp_path: Path) -> None:
    """A complete environment is left alone until `update-alternatives` or an update changes it."""
    header, venv = tmp_path / "include" / "mpi.h", tmp_path / "venv"
    program(tmp_path / "bin" / "mpicc", f'exec gcc -I "{header.parent}" "$@"')
    program(tmp_path / "bin" / "mpicxx", 'exec g++ "$@"')
    header.parent.mkdir()
    macros = "#define MPI_VERSION 3\n#define MPI_SUBVERSION 1\n#define MPICH_VERSION"
    header.write_text(f'{macros} "4.0.2"\n')
    base: str = sys._base_executable  # type: ignore[attr-defined]
    variables = {
        "PYTHON": base,
        "VENV": str(venv),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "CXX": "/nowhere/g++",
        "PATH": f"{tmp_path}/bin:{outside()}",
    }

    # This set-up ends because there is no compiler. Its trace shows the stamp it would write.
    first = command("bash", "-x", INSTALL / "setup.sh", variables=variables)
    (wanted,) = re.findall(r"^\+ wanted='(.*?)'$", first.stderr, flags=re.MULTILINE | re.DOTALL)
    program(venv / "bin" / "swap-hpc", "exit 1")
    (venv / "swap_hpc.stamp").write_text(wanted)
    base_line = wanted.splitlines()[6].rpartition(" ")[0]
    (venv / "swap_hpc.made_with").write_text(f"{wanted}\nbase: {base_line}\n")
    same = command(INSTALL / "setup.sh", variables=variables)
    assert (same.code, same.stdout, same.stderr) == (0, "", "")

    # With another version in the header, the set-up begins again and misses the compiler.
    header.write_text(f'{macros} "4.0.3"\n')
    anew = command(INSTALL / "setup.sh", variables=variables)
    refused(anew, "no C++ compiler (/nowhere/g++)")


def test_the_environments_packages_fit_together() -> None:
    done = command(sys.executable, "-m", "pip", "check")
    assert (done.code, done.stdout) == (0, "No broken requirements found.\n"), done.stdout


def test_horovod_has_nccl_if_asked_for_or_if_there_are_a_gpu_and_a_toolkit() -> None:
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
    variables = {"CXX": "/nowhere/g++", "SWAP_HPC_CACHE": str(tmp_path), "HOROVOD_BUILD": "cpu"}
    done = command(INSTALL / "horovod.sh", variables=variables)
    refused(done, "no C++ compiler (/nowhere/g++): install one (Debian: apt-get install g++)")


def kept_wheel(**variables: str) -> Path:
    """Return the path of this environment's Horovod, from the cache and without a compiler."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swap_hpc"
    known = {"CXX": "/nowhere/g++", "SWAP_HPC_CACHE": str(cache)}
    done = command(INSTALL / "horovod.sh", variables=known | variables)
    if "no C++ compiler" in done.stderr:
        pytest.skip(f"no wheel of Horovod in {cache}: make setup did not make this environment")
    assert done.code == 0, done.stderr
    return Path(done.stdout.strip())


def test_a_built_horovod_is_found_again_without_a_compiler() -> None:
    wheel = kept_wheel()
    assert wheel.suffix == ".whl" and f"cp{sys.version_info[0]}{sys.version_info[1]}" in wheel.name
    depends = (wheel.parent / "depends.txt").read_text()
    assert "horovod 0.28.1 " in depends
    assert f"torch {_version('torch')} " in depends
    assert shell(f'mpi_identity "{_mpicc()}"') in depends


def test_a_built_horovod_is_found_again_without_any_compiler(tmp_path: Path) -> None:
    """On a node without gcc, the MPI's wrapper has no compiler that could read its header."""
    if _mpicc() != str(BIN / "mpicc"):
        pytest.skip("only its wrapper knows where a site's mpi.h is")
    path = f"{BIN}:{path_of(tmp_path / 'bin', NEEDED)}"
    assert not shutil.which("gcc", path=path) and not shutil.which("cc", path=path)
    wheel = kept_wheel()
    variables = {"SWAP_HPC_CACHE": str(wheel.parents[1])}
    tried = command("env", f"PATH={path}", INSTALL / "horovod.sh", variables=variables)
    assert (tried.code, tried.stdout.strip()) == (0, str(wheel)), tried.stderr


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package).partition("+")[0]


def test_a_horovod_for_cpus_links_no_cuda_library(tmp_path: Path) -> None:
    """Horovod's own build would use a toolkit of the host."""
    wheel = kept_wheel(HOROVOD_BUILD="cpu")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, tmp_path], check=True)
    (library,) = tmp_path.glob("horovod/torch/*.so")

    needed = re.findall(r"NEEDED.*\[(.*)\]", _readelf("--dynamic", library))
    assert "libtorch_cpu.so" in needed and any(name.startswith("libmpi") for name in needed)
    of_cuda = re.compile("cuda|cudart|nccl|nvrtc|nvtx|nvToolsExt|cublas")
    assert [name for name in needed if of_cuda.search(name)] == []

    symbols = _readelf("--dyn-syms", "--wide", library)
    assert " UND " in symbols and not re.search(r"UND (cuda|cu[A-Z]|nccl)\w+", symbols)


def _readelf(*arguments: str | Path) -> str:
    done = subprocess.run(["readelf", *arguments], capture_output=True, text=True, check=True)
    return done.stdout
