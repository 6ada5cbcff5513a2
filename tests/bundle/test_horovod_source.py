"""The edits of Horovod's source: each applies once, and newer compilers accept the result."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launch import BIN, command

INSTALL = Path(__file__).parents[2] / "swap_hpc" / "install"
SETTINGS = {
    "HOROVOD_WITH_PYTORCH": "1",
    "HOROVOD_WITHOUT_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_WITH_MPI": "1",
    "HOROVOD_WITHOUT_GLOO": "1",
    "HOROVOD_WITHOUT_NVTX": "1",
}
CUDA = Path("/usr/local/cuda")


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the source as published."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swap_hpc"
    source = cache / "horovod-0.28.1.tar.gz"
    if not source.exists():
        pytest.skip(f"no {source}: make setup did not make this environment")
    folder = tmp_path_factory.mktemp("source")
    shutil.copy(source, folder)
    subprocess.run(["tar", "xzf", source, "-C", folder], check=True)
    return folder / "horovod-0.28.1"


@pytest.fixture(scope="session")
def configured(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder of the edited source, for CPUs, after CMake has configured it.

    The nvcc on the PATH leaves a file when it is called.
    """
    source = shutil.copytree(published, tmp_path_factory.mktemp("edited") / "horovod")
    done = command(sys.executable, INSTALL / "horovod_source.py", source)
    assert (done.code, done.stdout, done.stderr) == (0, "", "")
    nvcc = source / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f'#!/bin/bash\ntouch "{source}/nvcc-was-called"\nexec {CUDA}/bin/nvcc "$@"\n')
    nvcc.chmod(0o755)
    toolkit = CUDA if (CUDA / "bin" / "nvcc").exists() else nvcc.parents[1]
    made_with = (BIN.parent / "swap_hpc.made_with").read_text()
    site = re.search(r"^MPI=(/.*)$", made_with, flags=re.MULTILINE)
    mpi = Path(site[1]).parents[1] if site else BIN.parent
    variables = SETTINGS | {
        "CUDA_HOME": str(toolkit),
        "CUDACXX": str(nvcc),
        "PATH": f"{BIN}:{nvcc.parent}:{os.environ['PATH']}",
        "MPI_HOME": str(mpi),
    }
    build = source / "build"
    definitions = {
        "CMAKE_BUILD_TYPE": "RelWithDebInfo",
        "PYTHON_EXECUTABLE": sys.executable,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY_RELWITHDEBINFO": build / "lib",  # as Horovod's setup.py
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
    }
    options = (f"-D{name}={value}" for name, value in definitions.items())
    done = command("cmake", "-S", source, "-B", build, *options, variables=variables)
    assert done.code == 0, done.stdout + done.stderr
    return build


def test_another_source_is_refused_and_left_alone(published: Path, tmp_path: Path) -> None:
    """A source that is edited already counts as another, so that no edit is applied twice."""
    source = shutil.copytree(published, tmp_path / "horovod")
    table = source / "horovod" / "common" / "group_table.h"
    table.write_text(table.read_text().replace("#include <queue>", "#include <deque>"))
    before = (source / "CMakeLists.txt").read_text()
    done = command(sys.executable, INSTALL / "horovod_source.py", source)
    message = (
        "swap_hpc setup: horovod/common/group_table.h has '#include <queue>' 0 times, not once: "
        "this is not Horovod 0.28.1 as published\n"
    )
    assert (done.code, done.stderr) == (1, message)
    assert (source / "CMakeLists.txt").read_text() == before

    table.write_text(table.read_text().replace("#include <deque>", "#include <queue>"))
    assert command(sys.executable, INSTALL / "horovod_source.py", source).code == 0
    again = command(sys.executable, INSTALL / "horovod_source.py", source)
    assert again.code == 1
    assert "CMakeLists.txt has 'set(CMAKE_CXX_STANDARD 14)' 0 times" in again.stderr


def test_a_build_for_cpus_takes_no_toolkit(configured: Path) -> None:
    words = next(configured.rglob("link.txt")).read_text().split()
    libraries = [word for word in words if re.search(r"^-l|\.so$|\.a$", word)]
    assert any("libtorch_cpu" in name for name in libraries)
    assert not [name for name in libraries if re.search("cuda|nccl", name)]
    flags = "".join(path.read_text() for path in configured.rglob("flags.make"))
    assert "HAVE_MPI=1" in flags and "HAVE_CUDA" not in flags and "HAVE_GPU" not in flags
    assert "CMAKE_CUDA_COMPILER" not in (configured / "CMakeCache.txt").read_text()
    assert not (configured.parent / "nvcc-was-called").exists()


def test_the_driver_is_opened_by_the_name_that_every_host_has(configured: Path) -> None:
    horovod = configured.parent / "horovod"
    files = (*(horovod / "common").rglob("*.cc"), *(horovod / "torch").glob("*.cc"))
    text = "".join(path.read_text() for path in files)
    assert re.findall(r'dlopen\("(.*?)"', text) == ["libcuda.so.1"]


def test_every_launch_of_a_kernel_is_checked(configured: Path) -> None:
    """On a GPU that the kernels were not built for, a launch does nothing."""
    text = (configured.parent / "horovod/common/ops/cuda/cuda_kernels.cu").read_text()
    launching = [body for body in re.split(r"\n}\n", text) if "<<<" in body]
    assert len(launching) == 3
    for body in launching:
        assert "CheckLaunch(" in body.rpartition("<<<")[2], body[-300:]


@pytest.mark.parametrize("cuda, architectures", [("13", "75,80,90"), ("12", "70,75,80,90")])
def test_kernels_are_built_for_the_gpus_of_torchs_wheels(cuda: str, architectures: str) -> None:
    """Another list of GPUs means another wheel, except for CPUs."""
    script = (
        f". {INSTALL}/common.sh; gpu_architectures {cuda}; "
        f"for kind in nccl cpu; do horovod_depends cpython-311 2.14.1 {cuda} MPI $kind; done"
    )
    default = command("bash", "-c", script)
    lines = default.stdout.splitlines()
    assert default.code == 0 and lines[0] == architectures
    kinds = [line for line in lines if line.startswith("horovod ")]
    assert architectures in kinds[0] and architectures not in kinds[1]
    own = command("bash", "-c", script, variables={"HOROVOD_BUILD_CUDA_CC_LIST": "89"})
    lines = own.stdout.splitlines()
    assert lines[0] == "89"
    own_kinds = [line for line in lines if line.startswith("horovod ")]
    assert own_kinds == [kinds[0].replace(architectures, "89"), kinds[1]]


@pytest.mark.skipif(not (CUDA / "bin" / "nvcc").exists(), reason=f"no CUDA toolkit in {CUDA}")
def test_the_kernels_compile_for_those_gpus(configured: Path, tmp_path: Path) -> None:
    """The kernels are also there as PTX, which drivers compile for newer GPUs."""
    source, nvcc = configured.parent, CUDA / "bin" / "nvcc"
    version = command(nvcc, "--version").stdout
    major = version.partition("release ")[2].partition(".")[0]
    script = f". {INSTALL}/common.sh; gpu_architectures {major}"
    wanted = command("bash", "-c", script).stdout.strip()
    path = f"{nvcc.parent}:{os.environ['PATH']}"
    flags = "import build_utils; print(*build_utils.get_nvcc_flags())"
    variables = {
        "HOROVOD_BUILD_CUDA_CC_LIST": wanted,
        "PYTHONPATH": str(source / "cmake"),
        "PATH": path,
    }
    gpus = command(sys.executable, "-c", flags, variables=variables).stdout
    third_party = source / "third_party"
    line: list[str | Path] = [
        nvcc,
        *shlex.split(gpus),
        *("-std=c++14", "-DHAVE_CUDA=1", "-DHAVE_GPU=1", "--keep", "-c"),
        f"-I{third_party / 'boost/assert/include'}",
        f"-I{third_party / 'flatbuffers/include'}",
        source / "horovod/common/ops/cuda/cuda_kernels.cu",
    ]
    done = command(*line, variables={"PATH": path}, cwd=tmp_path)
    assert done.code == 0, done.stderr
    names = " ".join(path.name for path in tmp_path.glob("*.cubin"))
    cubins = set(re.findall(r"_(\d+)\.cubin\b", names))
    assert cubins == set(wanted.split(","))
    newest = max(cubins)
    assert f"sm_{newest},compute_{newest}" in gpus


def test_a_build_that_fails_shows_the_compilers_first_error(
    published: Path, tmp_path: Path
) -> None:
    """The compiler refuses one file; what pip prints around its error is left out."""
    compiler = tmp_path / "g++"
    reason = "group_table.h:35: error: 'string' in namespace 'std' does not name a type"
    refuse = f'case "$*" in *group_table.cc*) echo "{reason}" >&2; exit 1 ;; esac'
    compiler.write_text(f'#!/bin/bash\n{refuse}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    shutil.copy(published.parent / "horovod-0.28.1.tar.gz", tmp_path)
    variables = {"CXX": str(compiler), "SWAP_HPC_CACHE": str(tmp_path), "HOROVOD_BUILD": "cpu"}
    done = command(INSTALL / "horovod.sh", variables=variables)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("        ")]
    assert done.code == 1 and len(lines) == 2 and lines[0].endswith(reason), done.stderr
    version = command("g++", "--version").stdout.splitlines()[0]
    assert lines[1] == (
        f"swap_hpc setup: Horovod could not be built with {version}; "
        f"the first error is above, the log in {tmp_path}/horovod.log"
    )
    assert list(tmp_path.glob("horovod-*/*.whl")) == []


def newer_compilers() -> list[str]:
    """Return the compilers on the PATH that reject the published source, by name."""
    oldest = {"g++": 13, "clang++": 16}
    found = set()
    for folder in os.environ["PATH"].split(":"):
        for path in Path(folder).glob("*++-*"):
            match = re.fullmatch(r"(clang\+\+|g\+\+)-(\d+)", path.name)
            if match and int(match[2]) >= oldest[match[1]]:
                found.add(path.name)
    return sorted(found)


@pytest.mark.parametrize("compiler", newer_compilers() or [None])
def test_newer_compilers_accept_the_source(compiler: str | None, configured: Path) -> None:
    """They check every file that the build compiles, with its own options, and generate nothing."""
    if compiler is None:
        pytest.skip("no g++-13, clang++-16 or newer on the PATH: apt-get install clang-19")
    commands = json.loads((configured / "compile_commands.json").read_text())
    assert len(commands) >= 28

    def check(entry: dict[str, str]) -> str:
        line = shlex.split(entry["command"])
        at = line.index("-o")
        only = [compiler, *line[1:at], *line[at + 2 :], "-fsyntax-only", "-w"]
        done = subprocess.run(
            only, cwd=entry["directory"], capture_output=True, text=True, check=False
        )
        return "" if done.returncode == 0 else f"{entry['file']}: {done.stderr[:1000]}"

    with ThreadPoolExecutor(2) as both:
        assert [errors for errors in both.map(check, commands) if errors] == []
