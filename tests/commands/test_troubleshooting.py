"""Each row of the troubleshooting tables, produced: its message is the one that is quoted."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from launch import BIN, Finished, command, hydra, launch, swap_hpc, wait_for
from owners import ENDLESS, end_of, saves, start, suspend
from PIL import Image

from swap_hpc.run.owner import Owner

ROOT = Path(__file__).parents[2]
ON_CORES = {
    "PRTE_MCA_rmaps_default_mapping_policy": ":nooversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "0",
}


PAGES = ("slurm/README.md", "swap_hpc/README.md")


def rows() -> list[str]:
    """Return the first cells of the tables."""
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]
    sections = [page.partition("\n## Troubleshooting\n")[2].partition("\n## ")[0] for page in pages]
    return re.findall(r"^\| `(.+?)` \|", "".join(sections), flags=re.MULTILINE)


def as_pattern(symptom: str) -> str:
    return ".+".join(map(re.escape, symptom.split("…")))


def train(
    *fields: str, ranks: int | None = None, recipe: str = "digits", **how: object
) -> Finished:
    return swap_hpc(
        "train",
        recipe,
        *(word for field in fields for word in ("--set", field)),
        ranks=ranks,
        **how,
    )


def decoding(tmp: Path) -> Finished:
    for split in ("train", "test"):
        for name in "ab":
            (tmp / "images" / split / name).mkdir(parents=True)
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(
                tmp / "images" / split / name / "1.png"
            )
    (tmp / "images" / "train" / "b" / "1.png").write_text("no image")
    return train("data.name=folder", f"data.path={tmp / 'images'}", cwd=tmp)


def another_recipe(tmp: Path) -> Finished:
    (tmp / "runs" / "digits").mkdir(parents=True)
    recipe = (ROOT / "swap_hpc" / "recipe" / "digits.toml").read_text()
    (tmp / "runs" / "digits" / "recipe.toml").write_text("seed = 7\n" + recipe)
    (tmp / "runs" / "digits" / "environment.json").write_text('{"ranks": []}')
    (tmp / "runs" / "digits" / "large_batch.safetensors").touch()
    return train(cwd=tmp)


def other_mpirun(tmp: Path) -> Finished:
    """Start a rank with the variables of another MPI's launcher, unknown to our library."""
    size, rank, local = (f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_RANK"))
    return train(cwd=tmp, variables={size: "4", rank: "0", local: "0"})


def split_by_chance(tmp: Path) -> Finished:
    (tmp / "mine.py").write_text(
        "import numpy as np\n\n\n"
        "def load(path):\n"
        "    labels = np.random.default_rng().permutation(2000) % 10\n"
        "    images = np.zeros((2000, 8, 8, 1), np.uint8)\n"
        "    return (images, labels), (images[:50], labels[:50])\n"
    )
    return train("data.name=mine:load", ranks=2, cwd=tmp)


def in_use(tmp: Path) -> Finished:
    owner = start(tmp / "out", *ENDLESS)
    wait_for(lambda: saves(tmp / "out"), "save of the refinement")
    second = end_of(start(tmp / "out", *ENDLESS))
    owner.terminate()
    end_of(owner)
    return second


def taken_over(tmp: Path) -> Finished:
    """Suspend a job, and let one of another host own its folder meanwhile."""
    job = start(tmp / "out", *ENDLESS)
    wait_for(lambda: saves(tmp / "out"), "save of the refinement")
    suspend(job)
    (tmp / "out" / ".owner").write_text(Owner(host="n1", process=1).to_json())
    job.send_signal(signal.SIGCONT)
    return end_of(job)


def same_number(tmp: Path) -> Finished:
    """Kill an mpirun, and start another of its process number, as a restarted container does."""
    first = ("unshare", "--pid", "--fork", "--kill-child", BIN / "mpirun", "-n", "1")
    variables = {"TMPDIR": str(tmp)}
    rank = ("sh", "-c", "touch started; exec sleep infinity")
    killed = launch(*first, *rank, cwd=tmp, variables=variables)
    wait_for((tmp / "started").exists, "rank, after all files of its mpirun")
    killed.kill()
    killed.communicate()
    return command(*first, "true", variables=variables)


def on_gpu(tmp: Path, properties: str) -> Finished:
    """Start a run that seems to see a GPU of these properties."""
    (tmp / "sitecustomize.py").write_text(
        "import torch\nfrom types import SimpleNamespace\n\n\n"
        "def old():\n    raise RuntimeError('The NVIDIA driver on your system is too old')\n\n\n"
        "torch.cuda.device_count = lambda: 1\n"
        f"torch.cuda.get_device_properties = lambda index: {properties}\n"
        "torch.cuda.set_device = lambda device: None\n"
        "torch.cuda.get_device_name = lambda device: 'Tesla T4'\n"
    )
    return train("precision=bf16", cwd=tmp, variables={"PYTHONPATH": str(tmp)})


T4 = "SimpleNamespace(name='Tesla T4', major=7, minor=5, uuid='one')"

PRODUCE: dict[str, Callable[[Path], Finished]] = {
    "ranks cannot share": lambda tmp: train(ranks=3, cwd=tmp),
    "does not divide": lambda tmp: train("large_batch.batch_size=255", ranks=2, cwd=tmp),
    "no folder": lambda tmp: train("data.name=folder", cwd=tmp),
    "could not be downloaded": lambda tmp: swap_hpc(
        "data", "cifar10", "--data", tmp, variables={"https_proxy": "http://127.0.0.1:9"}
    ),
    "MPI sees a world of 1": other_mpirun,
    "torchrun or the like": lambda tmp: train(cwd=tmp, variables={"RANK": "0", "WORLD_SIZE": "2"}),
    "not enough slots": lambda tmp: command("true", ranks=500, variables=ON_CORES),
    "listener thread failed": same_number,
    "attempt to run as root": lambda tmp: command(
        BIN / "mpirun", "-n", "1", "true", variables={"OMPI_ALLOW_RUN_AS_ROOT": ""}
    ),
    "another recipe": another_recipe,
    "the loss is": lambda tmp: train("large_batch.learning_rate=1e30", cwd=tmp),
    "other data": split_by_chance,
    "cannot decode": decoding,
    "sees no GPU": lambda tmp: train(
        "device=cuda", cwd=tmp, variables={"CUDA_VISIBLE_DEVICES": ""}
    ),
    "the weights of rank": lambda tmp: train(
        "model.name=unaveraged:build",
        ranks=2,
        cwd=tmp,
        variables={"PYTHONPATH": str(ROOT / "tests")},
    ),
    "too old for": lambda tmp: on_gpu(tmp, "old()"),
    "bf16": lambda tmp: on_gpu(tmp, T4),
    "cannot be imported": lambda tmp: train("model.name=nets:build", cwd=tmp),
    "is in use by": in_use,
    "was taken over": taken_over,
    "no calibration": lambda tmp: swap_hpc("plan", "digits", cwd=tmp),
}


@pytest.mark.parametrize("symptom", rows())
def test_a_rows_symptom_is_what_is_said(symptom: str, tmp_path: Path) -> None:
    if any(part in symptom for part in ("as root", "PMIx")) and os.geteuid():
        pytest.skip("this user is not root")
    if hydra() and any(part in symptom for part in ("as root", "PMIx", "slots")):
        pytest.skip("Open MPI's mpirun says so; this one allows it")
    (produce,) = [produce for part, produce in PRODUCE.items() if part in symptom]
    done = produce(tmp_path)
    assert done.code != 0 and re.search(as_pattern(symptom), done.stderr), done.stderr


def test_the_table_is_read() -> None:
    assert len(rows()) == len(PRODUCE)
