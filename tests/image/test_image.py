"""The CPU image, built for real from docker/Dockerfile, and what runs inside it. `make test-image`, or `make test-image SUITE=bookworm`."""

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
from launch import BIN
from slurm_jobs import TESTS, commands, complete, places, submit, user_folder

ROOT = Path(__file__).parents[2]
SUITE = os.environ.get(
    "SUITE", "trixie"
)  # of Debian: another compiler, Python and C library than those of the host that CI runs on
INSTALL = "apt-get install --no-install-recommends buildah debootstrap"


@dataclass(frozen=True)
class Buildah:
    """Without a daemon, a registry or privileges beyond root's: its own storage in a folder, files copied, commands in a chroot."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        storage = self.folder / "storage.conf"
        return dict(os.environ) | {
            "CONTAINERS_STORAGE_CONF": str(storage), "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(self.folder / "tmp"),
        }  # fmt: skip

    def prepare(self) -> None:
        """With the cache of builds before: as with docker, a second build on a host finds Horovod and the wheels."""
        (self.folder / "tmp").mkdir()
        kept = Path(os.environ.get("SWAP_HPC_CACHE", Path.home() / ".cache" / "swap_hpc")) / "image"
        kept.mkdir(parents=True, exist_ok=True)
        for name in ("buildah-cache", f"buildah-cache-{os.getuid()}"):  # its versions differ
            (self.folder / "tmp" / name).symlink_to(kept)
        where = f'graphroot = "{self.folder}/storage"\nrunroot = "{self.folder}/run"\n'
        (self.folder / "storage.conf").write_text(f'[storage]\ndriver = "vfs"\n{where}')

    def __call__(self, *line: str | Path, seconds: float = 60) -> str:
        return self.run("buildah", *line, seconds=seconds)

    def run(self, *line: str | Path, seconds: float, **variables: str) -> str:
        done = subprocess.run(
            list(map(str, line)),
            cwd=ROOT,
            env=self.environment | variables,
            timeout=seconds,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout


@pytest.fixture(scope="session")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    if lacking := [
        program
        for program in ("buildah", "debootstrap")
        if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    ]:
        pytest.skip(f"no {', '.join(lacking)}: {INSTALL}")
    if os.geteuid() != 0:
        pytest.skip("building in a chroot needs root")
    tool = Buildah(tmp_path_factory.mktemp("image"))
    tool.prepare()
    yield tool
    shutil.rmtree(tool.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def base(buildah: Buildah) -> str:
    """A Debian image made here, from packages, because no registry may be reachable; it trusts and asks whom this host does."""
    name = f"docker.io/library/debian:{SUITE}"  # what `make image BASE=debian:trixie` asks for
    root = buildah.folder / "base"
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    lines = sources.read_text(encoding="utf-8").splitlines() if sources.exists() else []
    mirror = [line.split()[1] for line in lines if line.startswith("URIs:")][:1]
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    buildah.run("debootstrap", "--variant=minbase", SUITE, root, *mirror, seconds=600, PATH=path)
    certificates = root / "usr" / "local" / "share" / "ca-certificates"
    certificates.mkdir(parents=True, exist_ok=True)
    for file, copy in (
        ("/etc/pip.conf", root / "etc" / "pip.conf"),
        ("/etc/ssl/certs/ca-certificates.crt", certificates / "host.crt"),
    ):
        if Path(file).exists():
            shutil.copy(file, copy)
    tar = buildah.folder / "base.tar"
    buildah.run("tar", "--directory", root, "--create", "--file", tar, ".", seconds=120)
    shutil.rmtree(root)
    container = buildah("from", "scratch").strip()
    buildah("add", container, tar, "/", seconds=120)
    buildah("commit", "--rm", container, name, seconds=120)
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
    buildah.run(ROOT / "docker" / "image.sh", "--layers=false", seconds=1800, **settings)
    print(f"\nthe image was built in {time.monotonic() - begin:.0f} s")
    return "localhost/swap-hpc-test"


@pytest.fixture(scope="session")
def container(buildah: Buildah, image: str) -> str:
    return buildah("from", image, seconds=300).strip()


def test_the_image_is_one_for_users(buildah: Buildah, image: str) -> None:
    told = json.loads(buildah("inspect", "--type", "image", image))["OCIv1"]["config"]
    assert told["Cmd"] == ["swap-hpc", "doctor"] and not told.get("Entrypoint")
    assert told["User"] == "2000" and told["WorkingDir"] == "/home/swap"


def test_doctor_finds_no_problem_inside(buildah: Buildah, container: str) -> None:
    said = buildah("run", container, "--", "swap-hpc", "doctor")
    assert "no problem found" in said and "Horovod: mpi yes, nccl no" in said


def test_the_main_job_runs_inside_as_a_user(buildah: Buildah, container: str) -> None:
    """The README's command, without docker itself: as the caller, whom the image does not know, in the caller's folder."""
    (line,) = commands((ROOT / "README.md").read_text(), "docker run")
    assert '--user "$(id -u)" -v "$PWD:/work" -w /work swap_hpc mpirun -n 2 ' in line
    folder = buildah.folder / "work"
    folder.mkdir()
    os.chown(folder, 4242, 4242)
    options = ("--user", "4242", "--volume", f"{folder}:/work", "--workingdir", "/work")
    said = buildah(
        "run",
        *options,
        container,
        "--",
        "sh",
        "-c",
        f"id -u; {line.split(' swap_hpc ', 1)[1]}",
        seconds=300,
    )
    assert (
        said.startswith("4242\n")
        and "**averaged (SWAP)**" in said
        and "digits: 2 ranks, 4 groups" in said
    )
    result = folder / "runs" / "digits" / "result.json"
    assert json.loads(result.read_text())["ranks"] == 2 and result.stat().st_uid == 4242


def test_without_more_it_runs_as_a_user_of_its_own(buildah: Buildah, container: str) -> None:
    assert buildah(
        "run", container, "--", "sh", "-c", "id -u; pwd; touch here; swap-hpc --version"
    ).startswith("2000\n/home/swap\nswap_hpc ")


@pytest.mark.parametrize("mode", ["hybrid", "bind"])
def test_its_ranks_find_each_other_under_slurm(
    buildah: Buildah, container: str, tmp_path: Path, mode: str
) -> None:
    """swap-apptainer.sbatch: the host's srun starts ranks in the image; its MPI, or the host's, connects them over two nodes."""
    if why := missing():
        pytest.skip(f"no Slurm cluster can be started here: {why}")
    inside = {
        "SWAP_CONTAINER": str(TESTS / "apptainer_stand_in"),
        "SWAP_IMAGE": buildah("mount", container).strip(),
    }
    inside |= {"SWAP_MPI_DIR": str(BIN.parent)} if mode == "bind" else {}
    home = user_folder(tmp_path)
    with running(tmp_path / "cluster") as cluster:
        job = submit(
            cluster,
            home,
            "digits",
            "--set",
            "refine.epochs=1",
            script="slurm/swap-apptainer.sbatch",
            variables=inside,
        )
        result = complete(cluster, job, home / "runs" / "digits")
    assert result["ranks"] == 4 and [host for host, _ in places(home / "runs" / "digits")] == [
        "swap-n1",
        "swap-n1",
        "swap-n2",
        "swap-n2",
    ]
    told = json.loads((home / "runs" / "digits" / "environment.json").read_text())["mpi"]["file"]
    assert told.startswith(str(BIN.parent) if mode == "bind" else "/opt/swap_hpc/")


def test_the_image_holds_no_compiler_and_no_tools_for_developing(
    buildah: Buildah, container: str
) -> None:
    held = buildah(
        "run",
        container,
        "--",
        "sh",
        "-c",
        "for p in g++ cc pytest ruff mypy; do command -v $p; done; true",
    )
    assert held == ""
    where = "import swap_hpc, sys; print(swap_hpc.__file__)"
    assert buildah("run", container, "--", "python", "-c", where).startswith("/opt/swap_hpc/lib/")


def test_the_images_size(buildah: Buildah, image: str, base: str) -> None:
    """For the log; mostly torch's CUDA libraries. Nothing of what built it may be left."""
    (size,) = json.loads(buildah("images", "--json", image))
    print(f"\nthe image's size: {size['size']}")
    value, unit = size["size"].split()
    assert float(value) * {"MB": 1e-3, "GB": 1}[unit] < 9
