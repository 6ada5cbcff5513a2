"""The README by its letters: every command is run by some test, every link leads somewhere, the diff is that of the files."""

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

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "LOG.md",
    *(ROOT / "swap_hpc" / name / "README.md" for name in ("install", "recipes")),
]

# Lines that another test runs, or whose parts it does, and where
ELSEWHERE = {
    "make run": ".ci/run",
    "make test": ".ci/run",
    "swap-hpc train digits": "tests/commands/test_train.py",
    "mpirun -n 4 swap-hpc train digits": "tests/commands/test_train.py",
    "sbatch slurm/swap.sbatch digits": "tests/cluster/test_runs.py",
    "mpirun -n 16 swap-hpc pack DIR SHARDS": "tests/commands/test_imagenet_run.py",
    "mpirun -n 16 swap-hpc train imagenet --data SHARDS --set data.name=webdataset": "tests/commands/test_imagenet_run.py",
    "cd tests/examples": "tests/commands/test_examples.py",
    "mpirun -n 2 swap-hpc train discs.toml": "tests/commands/test_examples.py",
    "mpirun -n 2 swap-hpc train mine.toml": "tests/commands/test_readme.py",
    "swap-hpc study cifar10-cpu-table --data DIR": "tests/commands/test_studies.py",  # a small one: this takes hours
    "make bench": "tests/commands/test_bench.py",  # one of them: all want an idle machine
}

IN_A_CONTAINER = "docker run "  # tests/image


def lines() -> list[str]:
    """Those of all shell blocks, without their comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    return [line.partition("  #")[0].rstrip() for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_resolves(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert [
        link
        for link in links
        if "://" not in link and not (page.parent / link.partition("#")[0]).exists()
    ] == []


def test_no_line_elsewhere_is_gone() -> None:
    assert set(ELSEWHERE) <= set(lines()) | {"make bench"}
    for line, file in ELSEWHERE.items():
        text = (ROOT / file).read_text()
        command = (
            re.sub(r"^(mpirun -n \d+ )?(swap-hpc|sbatch|make|cd) ", "", line)
            .split()[0]
            .rpartition("/")[2]
        )
        assert command in text, f"{file} does not run {line}"


def test_the_other_lines_run_one_after_the_other(tmp_path: Path) -> None:
    typed = [
        line for line in lines() if line not in ELSEWHERE and not line.startswith(IN_A_CONTAINER)
    ]
    assert len(typed) >= 10
    for line in typed:
        done = command("bash", "-c", line, cwd=tmp_path, timeout=300)
        assert done.code == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    for name in (
        "report.md",
        "report.html",
        "curves.png",
        "landscape.png",
        "average-0-2-3.safetensors",
    ):
        assert (tmp_path / "runs" / "mine" / name).is_file(), name


def test_a_model_and_a_folder_of_ones_own_are_the_two_files_shown(tmp_path: Path) -> None:
    for kind, name in (("python", "nets.py"), ("toml", "mine.toml")):
        (block,) = re.findall(
            rf"`{name}`:\n\n```{kind}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL
        )
        (tmp_path / name).write_text(block)
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
    (block,) = re.findall(
        r"`use.py`:\n\n```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL
    )
    for name in ("dark", "bright"):
        shutil.copy(tmp_path / "images" / name / "0.jpg", tmp_path / "picture.jpg")
        used = command(sys.executable, "-c", block, cwd=tmp_path)
        assert used.stdout == f"{name}\n", used.stderr


@pytest.mark.parametrize(
    "kind", ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK", "I;16", "turned", "16-bit PGM"]
)
def test_a_picture_goes_through_what_training_images_did(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of `use.py` beside our decoding, for every kind of file that Pillow opens in a mode of its own."""
    (block,) = re.findall(r"^picture = .*?^pixels = .*?\n", README, flags=re.MULTILINE | re.DOTALL)
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
    (line,) = re.findall(r"`(swap-hpc report tests/runs/[^`]*)`", README)
    folders = line.split()[2:]
    for folder in folders:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.png"))
    done = command("bash", "-c", line, cwd=tmp_path, timeout=300)
    assert done.code == 0, done.stderr
    drawn = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    shown = {
        path
        for path in re.findall(r"!\[[^]]*\]\(([^)]*)\)", README)
        if path.rpartition("/")[0] in folders
    }
    assert len(shown) == 2 and shown <= drawn


def test_the_tree_names_every_module() -> None:
    (tree,) = re.findall(r"^## Files\n\n```\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"\b(\w+\.py)\b", tree.partition("\nslurm/")[0]))
    assert named == {
        path.name for path in (ROOT / "swap_hpc").glob("*.py") if not path.name.startswith("__")
    }


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
