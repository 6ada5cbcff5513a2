"""The edits of Horovod's source: they take hold once, and every newer compiler on this host accepts what they make of it."""

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
    "HOROVOD_WITH_PYTORCH": "1", "HOROVOD_WITHOUT_TENSORFLOW": "1", "HOROVOD_WITHOUT_MXNET": "1", "HOROVOD_WITH_MPI": "1",
    "HOROVOD_WITHOUT_GLOO": "1", "HOROVOD_WITHOUT_NVTX": "1",
}  # fmt: skip


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source as it was published."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swap_hpc"
    source = cache / "horovod-0.28.1.tar.gz"
    if not source.exists():
        pytest.skip(f"no {source}: this environment was not made by make setup")
    folder = tmp_path_factory.mktemp("source")
    shutil.copy(source, folder)
    subprocess.run(["tar", "xzf", source, "-C", folder], check=True)
    return folder / "horovod-0.28.1"


@pytest.fixture(scope="session")
def configured(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build for CPUs of the edited source, as far as CMake brings it, with a CUDA compiler on the PATH that marks its call."""
    source = shutil.copytree(published, tmp_path_factory.mktemp("edited") / "horovod")
    done = command(sys.executable, INSTALL / "horovod_source.py", source)
    assert (done.code, done.stdout, done.stderr) == (0, "", "")
    nvcc = source / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f'#!/bin/bash\ntouch "{source}/nvcc-was-called"\nexec /usr/local/cuda/bin/nvcc "$@"\n'
    )
    nvcc.chmod(0o755)
    own = Path("/usr/local/cuda/bin/nvcc").exists()
    toolkit = {
        "CUDA_HOME": "/usr/local/cuda" if own else str(nvcc.parents[1]),
        "CUDACXX": str(nvcc),
    }
    toolkit["PATH"] = f"{BIN}:{nvcc.parent}:{os.environ['PATH']}"
    site = re.search(
        r"^MPI=(/.*)$", (BIN.parent / "swap_hpc.made_with").read_text(), flags=re.MULTILINE
    )
    home = {"MPI_HOME": str(Path(site[1]).parents[1] if site else BIN.parent)}
    line = (
        "cmake",
        "-S",
        source,
        "-B",
        source / "build",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        f"-DPYTHON_EXECUTABLE={sys.executable}",
    )
    output = f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY_RELWITHDEBINFO={source}/build/lib"  # as Horovod's setup.py says
    done = command(
        *line,
        output,
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        variables=SETTINGS | toolkit | home,
        timeout=300,
    )
    assert done.code == 0, done.stdout + done.stderr
    return source / "build"


def test_another_source_is_refused_and_left_alone(published: Path, tmp_path: Path) -> None:
    """Also one that is edited already: no edit happens twice."""
    source = shutil.copytree(published, tmp_path / "horovod")
    table = source / "horovod" / "common" / "group_table.h"
    table.write_text(table.read_text().replace("#include <queue>", "#include <deque>"))
    before = (source / "CMakeLists.txt").read_text()
    done = command(sys.executable, INSTALL / "horovod_source.py", source)
    says = "horovod/common/group_table.h has '#include <queue>' 0 times, not once: this is not Horovod 0.28.1 as published"
    assert (done.code, done.stderr) == (1, f"swap_hpc setup: {says}\n") and (
        source / "CMakeLists.txt"
    ).read_text() == before
    table.write_text(table.read_text().replace("#include <deque>", "#include <queue>"))
    assert command(sys.executable, INSTALL / "horovod_source.py", source).code == 0
    again = command(sys.executable, INSTALL / "horovod_source.py", source)
    assert (
        again.code == 1
        and "CMakeLists.txt has 'set(CMAKE_CXX_STANDARD 14)' 0 times" in again.stderr
    )


def test_a_build_for_cpus_takes_no_toolkit(configured: Path) -> None:
    libraries = [
        word
        for word in next(configured.rglob("link.txt")).read_text().split()
        if re.search(r"^-l|\.so$|\.a$", word)
    ]
    flags = "".join(path.read_text() for path in configured.rglob("flags.make"))
    assert any("libtorch_cpu" in name for name in libraries) and not [
        name for name in libraries if re.search("cuda|nccl", name)
    ]
    assert "HAVE_MPI=1" in flags and "HAVE_CUDA" not in flags and "HAVE_GPU" not in flags
    assert "CMAKE_CUDA_COMPILER" not in (configured / "CMakeCache.txt").read_text()
    assert not (configured.parent / "nvcc-was-called").exists()


def test_the_driver_is_opened_by_the_name_that_every_host_has(configured: Path) -> None:
    files = [
        *(configured.parent / "horovod" / "common").rglob("*.cc"),
        *(configured.parent / "horovod" / "torch").glob("*.cc"),
    ]
    assert re.findall(r'dlopen\("(.*?)"', "".join(path.read_text() for path in files)) == [
        "libcuda.so.1"
    ]


def test_every_launch_of_a_kernel_is_checked(configured: Path) -> None:
    """A launch on a GPU that the kernels were not built for does nothing; each rank would keep its own gradients."""
    text = (configured.parent / "horovod/common/ops/cuda/cuda_kernels.cu").read_text()
    launching = [body for body in re.split(r"\n}\n", text) if "<<<" in body]
    assert len(launching) == 3
    for body in launching:
        assert "CheckLaunch(" in body.rpartition("<<<")[2], body[-300:]


@pytest.mark.parametrize("cuda, architectures", [("13", "75,80,90"), ("12", "70,75,80,90")])
def test_kernels_are_built_for_the_gpus_of_torchs_wheels(cuda: str, architectures: str) -> None:
    """The newest one as PTX, too, which the driver compiles for newer GPUs. Another list is another wheel, but for CPUs."""
    depends = f"horovod_depends cpython-311 2.14.1 {cuda} MPI $kind"
    script = (
        f". {INSTALL}/common.sh; gpu_architectures {cuda}; for kind in nccl cpu; do {depends}; done"
    )
    default = command("bash", "-c", script)
    lines = default.stdout.splitlines()
    assert default.code == 0 and lines[0] == architectures
    kinds = [line for line in lines if line.startswith("horovod ")]
    assert architectures in kinds[0] and architectures not in kinds[1]
    own = command(
        "bash", "-c", script, variables={"HOROVOD_BUILD_CUDA_CC_LIST": "89"}
    ).stdout.splitlines()
    assert own[0] == "89" and [line for line in own if line.startswith("horovod ")] == [
        kinds[0].replace(architectures, "89"),
        kinds[1],
    ]


@pytest.mark.skipif(
    not Path("/usr/local/cuda/bin/nvcc").exists(), reason="no CUDA toolkit in /usr/local/cuda"
)
def test_the_kernels_compile_for_those_gpus(configured: Path, tmp_path: Path) -> None:
    source, nvcc = configured.parent, Path("/usr/local/cuda/bin/nvcc")
    release = subprocess.run(
        [nvcc, "--version"], capture_output=True, text=True, check=True
    ).stdout.partition("release ")[2]
    script = f". {INSTALL}/common.sh; gpu_architectures {release.partition('.')[0]}"
    wanted = command("bash", "-c", script).stdout.strip()
    path = f"{nvcc.parent}:{os.environ['PATH']}"
    flags = "import build_utils; print(*build_utils.get_nvcc_flags())"
    variables = {
        "HOROVOD_BUILD_CUDA_CC_LIST": wanted,
        "PYTHONPATH": str(source / "cmake"),
        "PATH": path,
    }
    said = command(sys.executable, "-c", flags, variables=variables)
    include = [
        f"-I{source / 'third_party' / each}"
        for each in ("boost/assert/include", "flatbuffers/include")
    ]
    kernels = source / "horovod/common/ops/cuda/cuda_kernels.cu"
    line = [
        nvcc,
        *shlex.split(said.stdout),
        "-std=c++14",
        "-DHAVE_CUDA=1",
        "-DHAVE_GPU=1",
        *include,
        "-c",
        kernels,
    ]
    done = command(*map(str, line), "--keep", variables={"PATH": path}, cwd=tmp_path, timeout=300)
    assert done.code == 0, done.stderr
    cubins = {
        match[1]
        for path in tmp_path.glob("*.cubin")
        if (match := re.search(r"_(\d+)\.cubin$", path.name))
    }
    assert cubins == set(wanted.split(","))
    assert f"sm_{max(cubins)},compute_{max(cubins)}" in said.stdout  # as PTX, too


def test_a_build_that_fails_shows_the_compilers_first_error(
    published: Path, tmp_path: Path
) -> None:
    """Not what pip says around it, and no guess at the reason. The compiler refuses one file of the source."""
    compiler, says = (
        tmp_path / "g++",
        "group_table.h:35: error: 'string' in namespace 'std' does not name a type",
    )
    compiler.write_text(
        f'#!/bin/bash\ncase "$*" in *group_table.cc*) echo "{says}" >&2; exit 1 ;; esac\nexec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    shutil.copy(published.parent / "horovod-0.28.1.tar.gz", tmp_path)
    done = command(
        INSTALL / "horovod.sh",
        variables={"CXX": str(compiler), "SWAP_HPC_CACHE": str(tmp_path), "HOROVOD_BUILD": "cpu"},
        timeout=300,
    )
    told = [line for line in done.stderr.splitlines() if not line.startswith("        ")]
    assert done.code == 1 and len(told) == 2 and told[0].endswith(says), done.stderr
    version = subprocess.run(
        ["g++", "--version"], capture_output=True, text=True
    ).stdout.splitlines()[0]
    assert (
        told[1]
        == f"swap_hpc setup: Horovod could not be built with {version}; the first error is above, the log in {tmp_path}/horovod.log"
    )
    assert list(tmp_path.glob("horovod-*/*.whl")) == []


def newer_compilers() -> list[str]:
    """Those on the PATH that refuse the published source: of gcc from 13 on, of clang from 16 on."""
    names = {
        path.name
        for part in os.environ["PATH"].split(":")
        for path in Path(part).glob("*++*")
        if Path(part).is_dir()
    }
    found = {name: re.fullmatch(r"(clang\+\+|g\+\+)-(\d+)", name) for name in names}
    return sorted(
        name
        for name, match in found.items()
        if match and int(match[2]) >= {"g++": 13, "clang++": 16}[match[1]]
    )


@pytest.mark.parametrize("compiler", newer_compilers() or [None])
def test_newer_compilers_accept_the_source(compiler: str | None, configured: Path) -> None:
    """Every file that the build compiles, with its own options; nothing is generated."""
    if compiler is None:
        pytest.skip(
            "no g++ of 13 or newer and no clang++ of 16 or newer beside the default: apt-get install clang-19"
        )
    commands = json.loads((configured / "compile_commands.json").read_text())
    assert len(commands) >= 28

    def check(entry: dict[str, str]) -> str:
        line = shlex.split(entry["command"])
        at = line.index("-o")
        only = [compiler, *line[1:at], *line[at + 2 :], "-fsyntax-only", "-w"]
        done = subprocess.run(
            only, cwd=entry["directory"], capture_output=True, text=True, check=False, timeout=300
        )
        return "" if done.returncode == 0 else f"{entry['file']}: {done.stderr[:1000]}"

    with ThreadPoolExecutor(2) as both:
        assert [said for said in both.map(check, commands) if said] == []
