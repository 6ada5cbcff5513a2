"""The pages: a test runs every command and every block of code, every link leads somewhere."""

import difflib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from launch import command
from PIL import Image, ImageOps

from swap_hpc.data.decode import decode
from swap_hpc.data.splits import Files
from swap_hpc.recipe.loading import load_recipe, parse, tomllib

ROOT = Path(__file__).parents[2]
GUIDE = "swap_hpc/README.md"
# In the order in which their commands run, one after the other, in one folder.
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        GUIDE,
        "swap_hpc/data/README.md",
        "swap_hpc/study/README.md",
        "slurm/README.md",
        "docker/README.md",
        "tests/README.md",
        "swap_hpc/install/README.md",
        "swap_hpc/recipe/README.md",
        "swap_hpc/bench/README.md",
        "LOG.md",
    )
}
README = PAGES["README.md"]
DATA = PAGES["swap_hpc/data/README.md"]
STUDY = PAGES["swap_hpc/study/README.md"]
MADE_OF_THE_CODE = r"<!-- made by .*?<!-- end of .*?-->"  # tests/unit/test_pages.py compares it

# Lines that another test runs, or whose parts it runs: the file, and a part of it that shows so.
ELSEWHERE = {
    "make run": (".ci/run", "part run"),
    "make test": (".ci/run", "part test"),
    'make test ARGS="tests/unit"': ("Makefile", "-n $(JOBS) --no-loadscope-reorder $(ARGS)"),
    "make test-gpu": ("Makefile", "pytest tests/gpu"),
    "make test-slurm": (".ci/run", "SITES=cluster"),
    "make test-image": (".ci/run", "cluster image"),
    "make test-bundle": (".ci/run", "cluster bundle"),
    "make test-sites": (".ci/run", "part test-sites"),
    "make test-mpi": (".ci/run", "part test-mpi"),
    "python tests/hosts.py --hosts 4 --cores 0.25 --rate 100mbit -n 4 swap-hpc train digits": (
        "tests/cluster/test_hosts.py",
        '"train", "digits"',
    ),
    "make setup": ("Makefile", "run: setup"),
    "make lint": ("Makefile", "$(activate) && $(linters) &&"),
    "make pages": ("tests/unit/test_pages.py", "with_section"),
    "make soak": ("tests/commands/test_faults.py", "soak"),
    "make fuzz": ("tests/parallel/test_fuzz.py", "fuzz"),
    "make bench": ("tests/commands/test_bench.py", '"bench"'),  # one: all want an idle machine
    "python -m pytest tests/unit": ("pyproject.toml", '"tests/unit"'),
    "python -m pytest tests/parallel/test_averaging.py": ("pyproject.toml", '"tests/parallel"'),
    "swap-hpc train digits": ("tests/commands/test_train.py", "swap-hpc train digits"),
    "mpirun -n 4 swap-hpc train digits": (
        "tests/commands/test_train.py",
        "mpirun -n 4 swap-hpc train digits",
    ),
    "mpirun -n 2 swap-hpc train mine.toml": ("tests/commands/test_readme.py", "mine.toml"),
    "cd tests/examples": ("tests/commands/test_examples.py", "cwd=EXAMPLES"),
    "mpirun -n 2 swap-hpc train discs.toml": ("tests/commands/test_examples.py", "discs.toml"),
    **{
        f"mpirun -n 2 swap-hpc train {name}.toml": ("tests/commands/test_examples.py", f'"{name}"')
        for name in ("shifted_digits", "sums", "table", "vit")
    },
    "mpirun -n 4 python -m mpi4py tests/examples/swap_loop.py": (
        "tests/commands/test_examples.py",
        '"mpi4py", "tests/examples/swap_loop.py"',
    ),
    # On a port of their own, so that several may run at the same time.
    "torchrun --nproc-per-node 2 tests/examples/ddp_loop.py": (
        "tests/commands/test_launchers.py",
        '"ddp_loop.py", torchrun(ranks)',
    ),
    "torchrun --nproc-per-node 2 tests/examples/lightning_module.py": (
        "tests/commands/test_launchers.py",
        '"lightning_module.py", torchrun(2)',
    ),
    "torchrun --nproc-per-node 4 tests/examples/grid_loop.py": (
        "tests/commands/test_launchers.py",
        '"grid_loop.py", torchrun(4)',
    ),
    "mpirun -n 16 swap-hpc pack DIR SHARDS": ("tests/commands/test_imagenet_run.py", '"pack"'),
    "mpirun -n 16 swap-hpc train imagenet --data SHARDS --set data.name=webdataset": (
        "tests/commands/test_imagenet_run.py",
        "data.name={kind}",
    ),
    # A small study: this one takes hours.
    "swap-hpc study cifar10-cpu-table --data DIR": ("tests/commands/test_studies.py", '"study"'),
    "mpirun -n 2 swap-hpc landscape runs/cifar10-cpu-table/swap/seed-0 --data DIR": (
        "tests/commands/test_figures.py",
        '"landscape"',
    ),
    "swap-hpc report tests/runs/cifar10-cpu tests/runs/cifar10-cpu-table/swap/seed-0": (
        "tests/commands/test_readme.py",
        "swap-hpc report tests/runs",
    ),
    "sbatch slurm/swap.sbatch digits": ("tests/cluster/test_runs.py", "slurm/swap.sbatch digits"),
    "sbatch --nodes=4 slurm/swap.sbatch cifar10 --data DIR": (
        "tests/slurm_jobs.py",
        '"--nodes=2"',
    ),
    "sbatch --nodes=8 --ntasks-per-node=4 --gpus-per-node=4 slurm/swap.sbatch cifar10 --data DIR": (
        "tests/slurm_jobs.py",
        '"--ntasks-per-node=2", "--gpus-per-node=2"',
    ),
    "SWAP_IMAGE=swap_hpc.sif SWAP_BIND=/data"
    " sbatch --nodes=4 slurm/swap-apptainer.sbatch cifar10 --data /data/cifar10": (
        "tests/cluster/test_apptainer.py",
        '"SWAP_IMAGE"',
    ),
    "make image": ("tests/image/test_image.py", '"image.sh"'),
    "make image BASE=debian:trixie RUNTIME=debian:trixie-slim HOROVOD_BUILD=cpu": (
        "tests/image/test_image.py",
        '"HOROVOD_BUILD": "cpu"',
    ),
    # Its scripts and files alone: there is no Apptainer to be had.
    "apptainer build swap_hpc.sif docker/swap.def": ("tests/unit/test_scripts.py", '"swap.def"'),
    "apptainer build --build-arg BASE=debian:trixie --build-arg RUNTIME=debian:trixie-slim"
    " --build-arg HOROVOD_BUILD=cpu swap_hpc.sif docker/swap.def": (
        "tests/unit/test_scripts.py",
        '"swap.def"',
    ),
    "mpirun -n 4 apptainer exec --nv swap_hpc.sif swap-hpc train digits": (
        "tests/cluster/test_apptainer.py",
        "apptainer_stand_in",
    ),
    "make bundle": ("tests/bundle/test_bundle.py", '"bundle.sh"'),
    "make bundle VENV=.venv-312 PYTHON=python3.12 CUDA=12 HOROVOD_BUILD=nccl": (
        "tests/bundle/test_bundle.py",
        '"bundle.sh"',
    ),
    "VENV=/project/swap_hpc ./install.sh": ("tests/bundle/test_bundle.py", '"install.sh"'),
}
# Beginnings of further ones.
KINDS_ELSEWHERE = {
    "docker run ": ("tests/image/test_image.py", '"docker run"'),
    "swap-hpc bench": ("tests/commands/test_bench.py", '"bench"'),
}

# Blocks of code that are files: their names, and what each page calls them by.
FILES = {"python": {"nets.py", "use.py", "r2.py"}, "toml": {"mine.toml", "augment.toml"}}


def blocks(page: str, language: str) -> list[str]:
    """Return the blocks of a language that a page's author wrote."""
    written = re.sub(MADE_OF_THE_CODE, "", page, flags=re.DOTALL)
    return re.findall(rf"^```{language}\n(.*?)^```", written, flags=re.MULTILINE | re.DOTALL)


def file_shown(name: str, language: str) -> str:
    """Return the block of code that the page about data calls `name`."""
    pattern = rf"`{name}`:\n\n```{language}\n(.*?)^```"
    (block,) = re.findall(pattern, DATA, flags=re.MULTILINE | re.DOTALL)
    return block


def lines(page: str) -> list[str]:
    """Return the lines of a page's shell blocks, without their comments."""
    typed = [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [line.partition("  #")[0].rstrip() for line in typed]


@pytest.mark.parametrize("name", PAGES)
def test_every_relative_link_resolves(name: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[name])
    broken = [link for link in links if "://" not in link and not resolves(name, link)]
    assert broken == []


def resolves(name: str, link: str) -> bool:
    path, _, section = link.partition("#")
    file = (ROOT / name).parent / path if path else ROOT / name
    if not file.exists():
        return False
    if not section:
        return True
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return section in map(anchor, headings)


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_is_linked_and_tested() -> None:
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "swap_hpc").rglob("README.md")}
    found |= {str(path.relative_to(ROOT)) for path in ROOT.glob("[a-z]*/README.md")}
    assert found | {"README.md", "LOG.md"} == PAGES.keys()
    assert [name for name in found if f"]({name})" not in README] == []


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(README.split()) <= 1000


def test_every_block_of_code_is_known() -> None:
    for name, page in PAGES.items():
        opened = re.sub(MADE_OF_THE_CODE, "", page, flags=re.DOTALL)
        languages = re.findall(r"^```(\w*)\n.*?^```", opened, flags=re.MULTILINE | re.DOTALL)
        if name != "LOG.md":
            assert {*languages} <= {"sh", "text", "diff", *FILES}, name
    for language, names in FILES.items():
        shown = [block for page in PAGES.values() for block in blocks(page, language)]
        assert sorted(shown) == sorted(file_shown(name, language) for name in names)


def test_no_line_elsewhere_is_gone() -> None:
    assert {*ELSEWHERE} <= {line for page in PAGES.values() for line in lines(page)}
    for line, (file, part) in (ELSEWHERE | KINDS_ELSEWHERE).items():
        assert part in (ROOT / file).read_text(encoding="utf-8"), f"{file} does not run {line}"


def test_the_other_lines_run_one_after_the_other(tmp_path: Path) -> None:
    typed = dict.fromkeys(line for page in PAGES.values() for line in lines(page))  # each once
    kinds = tuple(KINDS_ELSEWHERE)
    here = [line for line in typed if line not in ELSEWHERE and not line.startswith(kinds)]
    assert len(here) >= 10
    # For the predictions, which read what a bench wrote.
    shutil.copytree(ROOT / "tests" / "runs" / "scaling", tmp_path / "tests" / "runs" / "scaling")
    for line in here:
        done = command("bash", "-c", line, cwd=tmp_path)
        assert done.code == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    for name in (
        "mine/report.md",
        "mine/report.html",
        "mine/curves.png",
        "mine/average-0-2-3.safetensors",
        "watched/landscape.png",
        "watched/trajectory.png",
    ):
        assert (tmp_path / "runs" / name).is_file(), name


def test_a_model_and_a_folder_of_ones_own_are_the_two_files_shown(tmp_path: Path) -> None:
    for language, name in (("python", "nets.py"), ("toml", "mine.toml")):
        (tmp_path / name).write_text(file_shown(name, language))
    generator = np.random.default_rng(0)
    for label, name in enumerate(("dark", "bright")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(200):
            pixels = generator.integers(0, 160, (40, 36, 3)) + 90 * label
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / name / f"{i}.jpg")
    done = command("bash", "-c", "mpirun -n 2 swap-hpc train mine.toml", cwd=tmp_path)
    assert done.code == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "runs" / "mine" / "result.json").read_text())
    assert result["groups"] == 2 and result["test_accuracy"]["averaged"] > 0.9
    block = file_shown("use.py", "python")
    for name in ("dark", "bright"):
        shutil.copy(tmp_path / "images" / name / "0.jpg", tmp_path / "picture.jpg")
        used = command(sys.executable, "-c", block, cwd=tmp_path)
        assert used.stdout == f"{name}\n", used.stderr


def test_the_section_about_augmentation_is_one_of_a_recipe() -> None:
    section = tomllib.loads(file_shown("augment.toml", "toml"))
    recipe = load_recipe("cifar10-cpu", ["augment.pad=0", "augment.cutout=0"])
    fields = recipe.model_dump(mode="json", exclude_none=True) | section
    assert parse(fields).augment.policy_rounds == 2


@pytest.mark.parametrize(
    "kind", ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK", "I;16", "turned", "16-bit PGM"]
)
def test_a_picture_goes_through_what_training_images_did(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of `use.py` give what our decoding gives, for every mode that Pillow opens."""
    (block,) = re.findall(r"^picture = .*?^pixels = .*?\n", DATA, flags=re.MULTILINE | re.DOTALL)
    values = np.random.default_rng(0).integers(0, 65536, (6, 8), dtype=np.uint16)
    picture = tmp_path / "picture.jpg"
    colours = Image.fromarray(
        np.stack([values >> 8, values & 255, values % 255], 2).astype(np.uint8)
    )
    if kind == "I;16":
        Image.fromarray(values).save(picture, "PNG")
    elif kind == "16-bit PGM":
        picture.write_bytes(b"P5 8 6 65535\n" + values.astype(">u2").tobytes())
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        colours.save(picture, "TIFF", exif=exif)
    else:
        colours.convert(kind).save(picture, "TIFF" if kind == "CMYK" else "PNG")
    ours = decode(Files((str(picture),), np.zeros(1, np.int64)), None, 1)[0]
    monkeypatch.chdir(tmp_path)
    names = {"np": np, "Image": Image, "ImageOps": ImageOps, "data": {"image_size": ours.shape[:2]}}
    exec(block, names)
    assert np.abs(names["pixels"] - ours).max() <= (2 if kind == "CMYK" else 0)


def test_the_figures_are_drawn_by_the_command_shown(tmp_path: Path) -> None:
    (line,) = [line for line in lines(STUDY) if line.startswith("swap-hpc report tests/runs")]
    folders = line.split()[2:]
    for folder in folders:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.png"))
    done = command("bash", "-c", line, cwd=tmp_path)
    assert done.code == 0, done.stderr
    drawn = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    images = [path.removeprefix("../../") for path in re.findall(r"!\[[^]]*\]\(([^)]*)\)", STUDY)]
    shown = {path for path in images if path.rpartition("/")[0] in folders}
    assert len(shown) == 2 and shown <= drawn


def test_the_loops_diff_is_that_of_the_files() -> None:
    (shown,) = re.findall(r"^```diff\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    plain, swap = (
        (ROOT / "tests" / "examples" / f"{name}_loop.py").read_text() for name in ("plain", "swap")
    )
    one, other = (
        text[text.index("def main(") : text.index("\nif __name__")].splitlines()
        for text in (plain, swap)
    )
    expected = [line for line in difflib.ndiff(one, other) if line[0] != "?"][1:]
    body = [line for line in expected if "return model" not in line and line.strip()]
    written = [line for line in shown.splitlines() if line.strip()]
    imports = [line[1:] for line in written if line.startswith(("+from", "+import"))]
    assert [line for line in imports if line not in swap] == []
    assert [(line[0], line[1:].strip()) for line in written if line[1:] not in imports] == [
        (line[0], line[2:].strip()) for line in body
    ]
    assert 0 < sum(line.startswith("+") for line in written) <= 10
