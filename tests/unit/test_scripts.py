"""Shell scripts, the Dockerfile and the Apptainer definition: linted, and of the same parts."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATTERNS = (
    "slurm/*",
    "docker/*.sh",
    "swap_hpc/install/*.sh",
    ".ci/run",
    "tests/apptainer_stand_in",
)
FOUND = (path for pattern in PATTERNS for path in ROOT.glob(pattern))
SCRIPTS = sorted(path for path in FOUND if path.name not in ("README.md", "site.env"))
DEFINITION = (ROOT / "docker" / "swap.def").read_text()
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


def shellcheck(*files: Path) -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck: apt-get install shellcheck")
    line = ["shellcheck", "--external-sources", *map(str, files)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_shellcheck_finds_nothing() -> None:
    assert len(SCRIPTS) >= 12
    shellcheck(*SCRIPTS)


def launched(folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run launch.sh with these variables and an srun that prints its arguments, one per line."""
    (folder / "srun").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (folder / "srun").chmod(0o755)
    known = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "7",
        "VIRTUAL_ENV": "x",
    }
    script = '. "$0"; launch true "it\'s data"'
    line: list[str | Path] = ["bash", "-c", script, ROOT / "slurm" / "launch.sh"]
    return subprocess.run(line, env=known | variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", []),
        ("--map-by node  --x", ["--map-by", "node", "--x"]),
        (
            "--mounts='/my data:/data' --image=a.example#b",
            ["--mounts=/my data:/data", "--image=a.example#b"],
        ),
        ('--name="it\'s" "a b" *', ["--name=it's", "a b", "*"]),
    ],
)
def test_further_launcher_arguments_may_be_quoted(
    arguments: str, words: list[str], tmp_path: Path
) -> None:
    done = launched(tmp_path, SWAP_LAUNCHER_ARGS=arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[3:] == [*words, "true", "it's data"]  # after srun's own three


def test_mpirun_is_told_to_notice_lost_hosts_as_the_page_says(tmp_path: Path) -> None:
    """`make setup` writes the same into the parameters of its own Open MPI."""
    (tmp_path / "mpirun").write_text("#!/bin/sh\nenv | grep keepalive\n")
    (tmp_path / "mpirun").chmod(0o755)
    done = launched(tmp_path, SWAP_LAUNCHER="mpirun")
    page = (ROOT / "slurm" / "README.md").read_text(encoding="utf-8")
    told = re.findall(r"PRTE_MCA_(oob_tcp_keepalive_\w+)=(\d+)", page)
    assert len(told) == 3
    families = ("OMPI", "PRTE")
    expected = [f"{family}_MCA_{name}={seconds}" for family in families for name, seconds in told]
    assert sorted(done.stdout.splitlines()) == sorted(expected), done.stderr
    setup = (ROOT / "swap_hpc" / "install" / "setup.sh").read_text(encoding="utf-8")
    assert all(f'"{name} = {seconds}"' in setup for name, seconds in told)


@pytest.mark.parametrize(
    ("state", "code", "restarts"),
    [
        ("done", 0, False),
        ("started", 0, False),  # a program that tells nothing
        ("preparing", 0, True),
        ("training", 0, True),
        ("preparing", 1, False),
        ("training", 1, True),
        # A rank that says why it ends is no lost node.
        (r"preparing\nfailed with 3", 0, False),
        (r"preparing\nfailed with 3", 3, False),
        (r"training\nfailed with 3", 0, True),
    ],
)
def test_a_launcher_that_ends_without_an_error_does_not_hide_a_lost_node(
    state: str, code: int, restarts: bool, tmp_path: Path
) -> None:
    (tmp_path / "mpirun").write_text(f"#!/bin/sh\nprintf '{state}' >$SWAP_HPC_STATE\nexit {code}\n")
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho scontrol $*\n")
    for name in ("mpirun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / "squeue").symlink_to("/bin/true")
    done = launched(tmp_path, SWAP_LAUNCHER="mpirun")
    failed = "failed" in state or code or restarts
    assert bool(done.returncode) == bool(failed), done.stderr
    assert done.stdout == "scontrol requeue 7\n" * restarts, done.stderr


def test_an_unmatched_quote_starts_nothing(tmp_path: Path) -> None:
    done = launched(tmp_path, SWAP_LAUNCHER_ARGS="--image=x --comment=it's --workdir=/a")
    assert done.returncode == 2 and "has an unmatched quote" in done.stderr
    assert not done.stdout


def test_a_number_of_restarts_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    for name in ("SWAP_RESTARTS", "SWAP_RETRIES"):
        done = launched(tmp_path, **{name: "many"})
        assert (done.returncode, done.stderr) == (
            2,
            f"swap: {name}=many is not a number: set it to 0 or more\n",
        )


def test_hadolint_finds_nothing() -> None:
    line: list[str | Path] = ["hadolint", "--no-color", ROOT / "docker" / "Dockerfile"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def copied_files() -> set[str]:
    """Return the files and folders that the Dockerfile copies into the image."""
    lines = re.findall(r"^COPY (?!--from)(.*)", DOCKERFILE, flags=re.MULTILINE)
    return {name for line in lines for name in line.split()[:-1]}


def sections(name: str) -> list[str]:
    """Return the text of each section of that name in the Apptainer definition."""
    return re.findall(rf"^%{name}\n((?:    .*\n|\n)+)", DEFINITION, flags=re.MULTILINE)


def test_the_definitions_scripts_are_sound(tmp_path: Path) -> None:
    scripts = sections("post") + sections("runscript")
    assert len(scripts) == 3
    for number, text in enumerate(scripts):
        file = tmp_path / f"{number}.sh"
        file.write_text("#!/bin/sh\nset -e\n" + re.sub(r"{{ \w+ }}", "value", text))
        shellcheck(file)


def test_dockerfile_and_definition_run_the_same_scripts_on_the_same_files() -> None:
    lines = [line for section in sections("files") for line in section.splitlines()]
    copied = copied_files()
    assert copied == {line.split()[0] for line in lines if line.strip()}
    assert all((ROOT / name).exists() for name in copied)

    runs = re.compile(r"/src/\S+\.sh(?: (?:build|run))?")
    assert sorted(runs.findall(DOCKERFILE)) == sorted(runs.findall("".join(sections("post"))))

    arguments = re.compile(
        r"(?:ARG |    )(BASE|RUNTIME|CUDA|HOROVOD_BUILD)=(?:docker.io/(?:library/)?)?(\S+)"
    )
    body = DEFINITION.split("Bootstrap", 1)[1]  # without the examples of the header
    assert set(arguments.findall(DOCKERFILE)) == set(arguments.findall(body))


def test_the_context_is_small() -> None:
    """Only what the Dockerfile copies is sent to the builder."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert lines[1] == "*"  # everything else is excluded
    assert allowed == copied_files()


def test_every_setting_of_the_batch_scripts_is_documented() -> None:
    """site.env.example has each variable that the batch scripts read."""
    texts = [path.read_text() for path in (ROOT / "slurm").glob("*")]
    read = {name for text in texts for name in re.findall(r"\$\{(SWAP_[A-Z_]+)", text)}
    example = (ROOT / "slurm" / "site.env.example").read_text()
    documented = set(re.findall(r"\b(SWAP_[A-Z_]+)=", example))
    assert read - {"SWAP_SLURM"} == documented
