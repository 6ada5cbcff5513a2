"""Shell scripts, the Dockerfile and the Apptainer definition: what their linters say, and that they share one logic."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path
    for pattern in (
        "slurm/*",
        "docker/*.sh",
        "swap_hpc/install/*.sh",
        ".ci/run",
        "tests/apptainer_stand_in",
    )
    for path in ROOT.glob(pattern)
    if path.name != "site.env"
)
DEFINITION = (ROOT / "docker" / "swap.def").read_text()
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


def shellcheck(*files: Path) -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck: apt-get install shellcheck")
    done = subprocess.run(
        ["shellcheck", "--external-sources", *map(str, files)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_shellcheck_finds_nothing() -> None:
    assert len(SCRIPTS) >= 12
    shellcheck(*SCRIPTS)


def launched(folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """What launch.sh makes of variables, where srun does nothing but say its arguments, one on a line."""
    (folder / "srun").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (folder / "srun").chmod(0o755)
    known = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "7",
        "VIRTUAL_ENV": "x",
    }
    line: list[str | Path] = [
        "bash",
        "-c",
        '. "$0"; launch true "it\'s data"',
        ROOT / "slurm" / "launch.sh",
    ]
    return subprocess.run(line, env=known | variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("told", "words"),
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
    told: str, words: list[str], tmp_path: Path
) -> None:
    done = launched(tmp_path, SWAP_LAUNCHER_ARGS=told)
    assert done.returncode == 0 and done.stdout.splitlines()[3:] == [*words, "true", "it's data"], (
        done.stderr
    )


def test_a_quote_without_its_other_one_starts_nothing(tmp_path: Path) -> None:
    done = launched(tmp_path, SWAP_LAUNCHER_ARGS="--image=x --comment=it's --workdir=/a")
    assert done.returncode == 2 and "has a quote without its other one" in done.stderr
    assert not done.stdout


def test_a_number_of_restarts_that_is_none_is_named(tmp_path: Path) -> None:
    for name in ("SWAP_RESTARTS", "SWAP_RETRIES"):
        done = launched(tmp_path, **{name: "many"})
        assert (done.returncode, done.stderr) == (2, f"swap: {name}=many is no number\n")


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        ["hadolint", "--no-color", ROOT / "docker" / "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def sections(name: str) -> list[str]:
    return re.findall(rf"^%{name}\n((?:    .*\n|\n)+)", DEFINITION, flags=re.MULTILINE)


def test_the_definitions_scripts_are_sound(tmp_path: Path) -> None:
    scripts = sections("post") + sections("runscript")
    assert len(scripts) == 3
    for number, text in enumerate(scripts):
        file = tmp_path / f"{number}.sh"
        file.write_text("#!/bin/sh\nset -e\n" + re.sub(r"{{ \w+ }}", "value", text))
        shellcheck(file)


def test_dockerfile_and_definition_run_the_same_scripts_on_the_same_files() -> None:
    lines = [
        line.split()[0]
        for section in sections("files")
        for line in section.splitlines()
        if line.strip()
    ]
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.*)", DOCKERFILE, flags=re.MULTILINE)
        for name in line.split()[:-1]
    }
    assert copied == set(lines) and all((ROOT / name).exists() for name in copied)
    runs = re.compile(r"/src/\S+\.sh(?: (?:build|run))?")
    assert sorted(runs.findall(DOCKERFILE)) == sorted(runs.findall("".join(sections("post"))))
    arguments = re.compile(
        r"(?:ARG |    )(BASE|RUNTIME|CUDA|HOROVOD_BUILD)=(?:docker.io/(?:library/)?)?(\S+)"
    )
    assert set(arguments.findall(DOCKERFILE)) == set(
        arguments.findall(DEFINITION.split("Bootstrap", 1)[1])
    )


def test_the_context_is_small() -> None:
    """Only what the Dockerfile copies is sent to the builder."""
    allowed = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.*)", DOCKERFILE, flags=re.MULTILINE)
        for name in line.split()[:-1]
    }
    assert allowed == copied and (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"


def test_the_batch_scripts_tell_of_every_setting() -> None:
    """What launch.sh and the scripts read stands in site.env.example."""
    read = {
        name
        for path in (ROOT / "slurm").glob("*")
        for name in re.findall(r"\$\{(SWAP_[A-Z_]+)", path.read_text())
    }
    told = set(re.findall(r"\b(SWAP_[A-Z_]+)=", (ROOT / "slurm" / "site.env.example").read_text()))
    assert read - {"SWAP_SLURM"} == told
