"""The CPU image, built from docker/Dockerfile, and runs inside it.

Run by `make test-image`, or `make test-image SUITE=bookworm`.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster_of_two import missing, running
from launch import BIN, HANG, settings
from slurm_jobs import TESTS, commands, complete, places, submit, user_folder

ROOT = Path(__file__).parents[2]
# Debian 13 by default: CI's hosts have Debian 12, with another compiler, Python and C library.
SUITE = os.environ.get("SUITE", "trixie")
INSTALL = "apt-get install --no-install-recommends buildah debootstrap"


@dataclass(frozen=True)
class Buildah:
    """buildah without a daemon, a registry or privileges beyond root's.

    Its storage is a folder, its layers are copies, and its commands run in a chroot.
    """

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        storage = self.folder / "storage.conf"
        return dict(os.environ) | {
            "CONTAINERS_STORAGE_CONF": str(storage),
            "BUILDAH_ISOLATION": "chroot",
            "TMPDIR": str(self.folder / "tmp"),
        }

    def prepare(self) -> None:
        """Set up the storage, with the cache of earlier builds.

        As with docker, a second build on a host finds Horovod and the wheels.
        """
        (self.folder / "tmp").mkdir()
        kept = Path(os.environ.get("SWAP_HPC_CACHE", Path.home() / ".cache" / "swap_hpc")) / "image"
        kept.mkdir(parents=True, exist_ok=True)
        # The name of the cache depends on buildah's version.
        for name in ("buildah-cache", f"buildah-cache-{os.getuid()}"):
            (self.folder / "tmp" / name).symlink_to(kept)
        where = f'graphroot = "{self.folder}/storage"\nrunroot = "{self.folder}/run"\n'
        (self.folder / "storage.conf").write_text(f'[storage]\ndriver = "vfs"\n{where}')

    def __call__(self, *line: str | Path) -> str:
        return self.run("buildah", *line)

    def run(self, *line: str | Path, **variables: str) -> str:
        """Run a command, and return its output."""
        done = subprocess.run(
            list(map(str, line)),
            cwd=ROOT,
            env=self.environment | variables,
            timeout=4 * HANG,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout


@pytest.fixture(scope="session")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    path = f"{os.environ['PATH']}:/usr/sbin"
    needed = ("buildah", "debootstrap")
    if lacking := [program for program in needed if not shutil.which(program, path=path)]:
        pytest.skip(f"no {', '.join(lacking)}: {INSTALL}")
    if os.geteuid() != 0:
        pytest.skip("building in a chroot needs root")
    tool = Buildah(tmp_path_factory.mktemp("image"))
    tool.prepare()
    yield tool
    shutil.rmtree(tool.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def base(buildah: Buildah) -> str:
    """A Debian image made from packages, because no registry may be reachable.

    It uses this host's package mirror, package index and certificates.
    """
    name = f"docker.io/library/debian:{SUITE}"  # the name that BASE=debian:trixie stands for
    root = buildah.folder / "base"
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    lines = sources.read_text(encoding="utf-8").splitlines() if sources.exists() else []
    mirror = [line.split()[1] for line in lines if line.startswith("URIs:")][:1]
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    buildah.run("debootstrap", "--variant=minbase", SUITE, root, *mirror, PATH=path)
    certificates = root / "usr" / "local" / "share" / "ca-certificates"
    certificates.mkdir(parents=True, exist_ok=True)
    copies = {
        "/etc/pip.conf": root / "etc" / "pip.conf",
        "/etc/ssl/certs/ca-certificates.crt": certificates / "host.crt",
    }
    for file, copy in copies.items():
        if Path(file).exists():
            shutil.copy(file, copy)
    tar = buildah.folder / "base.tar"
    buildah.run("tar", "--directory", root, "--create", "--file", tar, ".")
    shutil.rmtree(root)
    container = buildah("from", "scratch").strip()
    buildah("add", container, tar, "/")
    buildah("commit", "--rm", container, name)
    tar.unlink()
    return name


@pytest.fixture(scope="session")
def image(buildah: Buildah, base: str) -> str:
    begin = time.monotonic()
    settings = {
        "TOOL": "buildah",
        "IMAGE": "swap-hpc-test",
        "BASE": base,
        "RUNTIME": base,
        "HOROVOD_BUILD": "cpu",
    }
    buildah.run(ROOT / "docker" / "image.sh", "--layers=false", **settings)
    print(f"\nthe image was built in {time.monotonic() - begin:.0f} s")
    return "localhost/swap-hpc-test"


@pytest.fixture(scope="session")
def container(buildah: Buildah, image: str) -> str:
    return buildah("from", image).strip()


def test_the_image_is_one_for_users(buildah: Buildah, image: str) -> None:
    config = json.loads(buildah("inspect", "--type", "image", image))["OCIv1"]["config"]
    assert config["Cmd"] == ["swap-hpc", "doctor"] and not config.get("Entrypoint")
    assert config["User"] == "2000" and config["WorkingDir"] == "/home/swap"


def test_doctor_finds_no_problem_inside(buildah: Buildah, container: str) -> None:
    output = buildah("run", container, "--", "swap-hpc", "doctor")
    assert "no problem found" in output and "Horovod: mpi yes, nccl no" in output


def test_the_main_job_runs_inside_as_a_user(buildah: Buildah, container: str) -> None:
    """The README's command without docker itself: in the caller's folder, as an unknown user."""
    (line,) = commands((ROOT / "README.md").read_text(), "docker run")
    assert '--user "$(id -u)" -v "$PWD:/work" -w /work swap_hpc mpirun -n 2 ' in line
    folder = buildah.folder / "work"
    folder.mkdir()
    os.chown(folder, 4242, 4242)
    options = ("--user", "4242", "--volume", f"{folder}:/work", "--workingdir", "/work")
    inside = f"id -u; {line.split(' swap_hpc ', 1)[1]}"
    output = buildah("run", *options, container, "--", "sh", "-c", inside)
    assert output.startswith("4242\n")
    assert "digits: 2 ranks, 4 groups" in output and "**averaged (SWAP)**" in output
    result = folder / "runs" / "digits" / "result.json"
    assert json.loads(result.read_text())["ranks"] == 2 and result.stat().st_uid == 4242


def test_by_default_it_runs_as_the_images_user(buildah: Buildah, container: str) -> None:
    inside = "id -u; pwd; touch here; swap-hpc --version"
    output = buildah("run", container, "--", "sh", "-c", inside)
    assert output.startswith("2000\n/home/swap\nswap_hpc ")


@pytest.mark.parametrize("mode", ["hybrid", "bind"])
def test_its_ranks_find_each_other_under_slurm(
    buildah: Buildah, container: str, tmp_path: Path, mode: str
) -> None:
    """swap-apptainer.sbatch: the host's srun starts ranks in the image, on two nodes.

    Their MPI is the image's (hybrid) or the host's (bind).
    """
    if why := missing():
        pytest.skip(f"no Slurm cluster can be started here: {why}")
    variables = {
        "SWAP_CONTAINER": str(TESTS / "apptainer_stand_in"),
        "SWAP_IMAGE": buildah("mount", container).strip(),
    }
    if mode == "bind":
        variables["SWAP_MPI_DIR"] = str(BIN.parent)
    home = user_folder(tmp_path)
    out = home / "runs" / "digits"
    script = "slurm/swap-apptainer.sbatch"
    line = ("digits", *settings("refine.epochs=1"))
    with running(tmp_path / "cluster") as cluster:
        job = submit(cluster, home, *line, script=script, variables=variables)
        result = complete(cluster, job, out)
    assert result["ranks"] == 4
    assert [host for host, _ in places(out)] == ["swap-n1", "swap-n1", "swap-n2", "swap-n2"]
    library = json.loads((out / "environment.json").read_text())["mpi"]["file"]
    assert library.startswith(str(BIN.parent) if mode == "bind" else "/opt/swap_hpc/")


def test_the_image_holds_no_compiler_and_no_tools_for_developing(
    buildah: Buildah, container: str
) -> None:
    search = "for p in g++ cc pytest ruff mypy; do command -v $p; done; true"
    assert buildah("run", container, "--", "sh", "-c", search) == ""
    where = "import swap_hpc, sys; print(swap_hpc.__file__)"
    assert buildah("run", container, "--", "python", "-c", where).startswith("/opt/swap_hpc/lib/")


def test_the_images_size(buildah: Buildah, image: str, base: str) -> None:
    """Most of it is torch's CUDA libraries. The files that built it must not add to it."""
    (size,) = json.loads(buildah("images", "--json", image))
    print(f"\nthe image's size: {size['size']}")
    value, unit = size["size"].split()
    assert float(value) * {"MB": 1e-3, "GB": 1}[unit] < 9
