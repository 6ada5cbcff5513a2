"""The main job and the commands around it, as a user starts them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import BIN, command, settings, swap_hpc
from safetensors.torch import load_file

from swap_hpc import __version__
from swap_hpc.average.agreement import weights_sha256
from swap_hpc.recipe.loading import load_recipe, shipped_recipes

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# The keys of result.json, and those of the objects in it.
KEYS = {
    "recipe": None,
    "seed": None,
    "ranks": None,
    "refine_ranks": None,
    "groups": None,
    "cycles": None,
    "weights_sha256": None,
    "epochs": {"large_batch", "refine"},
    "train_accuracy": {"large_batch"},
    "test_accuracy": {"large_batch", "groups", "mean_of_groups", "averaged"},
    "test_loss": {"large_batch", "groups", "mean_of_groups", "averaged"},
    "seconds": {
        "setup",
        "large_batch",
        "refine",
        "average",
        "batchnorm",
        "evaluate",
        "save",
        "total",
    },
    "images_per_second": {"large_batch", "refine"},
    "peak_memory_mib": {"host", "gpu_allocated", "gpu_reserved"},
}
# A small and quick variant of digits
QUICK = settings("large_batch.epochs=2", "refine.epochs=1", "model.width=2")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of the shipped recipe's run on 4 ranks."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    done = swap_hpc("train", "digits", "--out", out, ranks=4)
    assert done.code == 0, done.stderr
    return out, done.stdout


def result_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())


def lines(out: Path, part: str) -> list[dict[str, Any]]:
    """Return the metrics of a part of a run ("world", "group-000" ...)."""
    text = (out / "metrics" / f"{part}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_main_job_leaves_the_documented_files(digits: tuple[Path, str]) -> None:
    out, _ = digits
    result = result_of(out)
    found = {key: set(value) if isinstance(value, dict) else None for key, value in result.items()}
    assert found == KEYS
    groups = [f"group-{group:03d}" for group in range(4)]
    files = {"recipe.toml", "environment.json", "result.json", "metrics"}
    models = {f"{name}.safetensors" for name in ("large_batch", "swap", *groups)}
    assert {path.name for path in out.iterdir()} == files | models
    metrics = {f"{name}.jsonl" for name in ("world", *groups)}
    assert {path.name for path in (out / "metrics").iterdir()} == metrics
    assert load_recipe(str(out / "recipe.toml")) == load_recipe("digits")
    environment = json.loads((out / "environment.json").read_text())
    assert [each["rank"] for each in environment["ranks"]] == [0, 1, 2, 3]
    assert environment["versions"]["horovod"] == "0.28.1"


def test_the_main_job_learns(digits: tuple[Path, str]) -> None:
    result = result_of(digits[0])
    accuracy, loss = result["test_accuracy"], result["test_loss"]
    # One of 599 images is worth 0.17 points, and a processor's rounding may decide it. The loss is
    # finer, so the average is compared with its groups by their losses.
    assert accuracy["averaged"] >= 0.975 and loss["averaged"] < loss["mean_of_groups"]
    assert len(accuracy["groups"]) == 4
    assert accuracy["mean_of_groups"] == pytest.approx(sum(accuracy["groups"]) / 4)
    assert 0 < result["seconds"]["refine"] < result["seconds"]["total"]
    assert result["images_per_second"]["refine"] > 0


def test_the_main_job_ends_with_its_table(digits: tuple[Path, str]) -> None:
    out, output = digits
    accuracy = result_of(out)["test_accuracy"]
    assert "**averaged (SWAP)**" in output and "batchnorm" in output
    assert f"{100 * accuracy['averaged']:.2f}" in output
    assert "large_batch  epoch   1/" in output
    # The first rank prints its own group's epochs.
    assert "group 0      epoch   1/" in output and "group 1      epoch" not in output


def test_the_files_hold_the_models_of_the_result(digits: tuple[Path, str]) -> None:
    import torch
    from torch import nn

    class Held(nn.Module):
        def __init__(self, tensors: dict[str, torch.Tensor]):
            super().__init__()
            self.tensors = tensors

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return self.tensors

    out, _ = digits
    swap = load_file(out / "swap.safetensors")
    assert weights_sha256(Held(swap)) == result_of(out)["weights_sha256"]
    groups = [load_file(out / f"group-{group:03d}.safetensors") for group in range(4)]
    name = "linear.weight"
    mean = torch.stack([group[name].double() for group in groups]).mean(0).float()
    assert torch.equal(swap[name], mean)


def test_every_epoch_has_its_line(digits: tuple[Path, str]) -> None:
    out, _ = digits
    result = result_of(out)
    world = lines(out, "world")
    epochs = [line["epoch"] for line in world if line["phase"] == "large_batch"]
    assert epochs == list(range(1, result["epochs"]["large_batch"] + 1))
    evaluated = [line["model"] for line in world if line["phase"] == "evaluation"]
    assert evaluated == ["large_batch", "swap"]
    for group, accuracy in enumerate(result["test_accuracy"]["groups"]):
        refined = lines(out, f"group-{group:03d}")
        assert len(refined) == result["epochs"]["refine"]
        assert refined[-1]["test_accuracy"] == accuracy
        assert refined[-1]["learning_rate"] == 0


@pytest.mark.parametrize(
    ("line", "page"),
    [
        ("swap-hpc train digits", "swap_hpc/README.md"),
        ("mpirun -n 4 swap-hpc train digits", "README.md"),
    ],
)
def test_the_pages_commands(line: str, page: str, tmp_path: Path) -> None:
    """Commands for one machine. tests/cluster and tests/image run those of clusters and images."""
    typed = [line.split("  #")[0].rstrip() for line in (ROOT / page).read_text().splitlines()]
    assert line in typed
    done = command(*line.split(), cwd=tmp_path)
    assert done.code == 0 and "**averaged (SWAP)**" in done.stdout, done.stderr
    assert result_of(tmp_path / "runs" / "digits")["test_accuracy"]["averaged"] > 0.975
    if line.startswith("mpirun"):
        assert_is_what_the_readme_shows(done.stdout)


def assert_is_what_the_readme_shows(output: str) -> None:
    """Compare the output with the lines that the README shows for `make run`, without numbers."""
    (block,) = re.findall(r"^```text\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    printed = {without_numbers(line) for line in output.splitlines()}
    assert [line for line in block.splitlines() if without_numbers(line) not in printed] == []


def without_numbers(line: str) -> str:
    return re.sub(r"[\d.]+", "0", line)


def test_a_finished_run_says_so_and_is_left_alone(digits: tuple[Path, str]) -> None:
    out, _ = digits
    before = (out / "result.json").stat().st_mtime_ns
    done = swap_hpc("train", "digits", "--out", out, ranks=2)
    assert done.code == 0 and "**averaged (SWAP)**" in done.stdout
    assert f"{out} holds this run, complete: nothing to do" in done.stdout
    assert (out / "result.json").stat().st_mtime_ns == before


def test_report_writes_a_table_and_a_figure(digits: tuple[Path, str]) -> None:
    out, _ = digits
    done = swap_hpc("report", out)
    assert done.code == 0 and "**averaged (SWAP)**" in (out / "report.md").read_text()
    figure = (out / "curves.png").read_bytes()
    assert figure.startswith(b"\x89PNG") and len(figure) > 20_000
    for path in (out / "report.md", out / "curves.png"):
        path.unlink()


def test_report_of_what_is_no_run(tmp_path: Path) -> None:
    done = swap_hpc("report", tmp_path)
    message = f"{tmp_path} is not a run's folder: there is no result.json in it"
    assert done.code == 2 and done.ours == [f"swap-hpc: {message}"]


def test_alone_it_refines_every_group_and_repeats_bit_for_bit(tmp_path: Path) -> None:
    results = []
    for out in (tmp_path / "one", tmp_path / "two"):
        done = swap_hpc("train", "digits", *QUICK, "--out", out)
        assert done.code == 0, done.stderr
        results.append(result_of(out))
    assert results[0]["ranks"] == 1 and len(results[0]["test_accuracy"]["groups"]) == 4
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]


def test_three_ranks_repeat_bit_for_bit(tmp_path: Path) -> None:
    """A sum over three or more ranks has several orders; ours has a fixed one."""
    fields = (*QUICK, *settings("groups=3", "large_batch.batch_size=240"))
    hashes = set()
    for out in (tmp_path / "one", tmp_path / "two"):
        done = swap_hpc("train", "digits", *fields, "--out", out, ranks=3)
        assert done.code == 0, done.stderr
        hashes.add(result_of(out)["weights_sha256"])
    assert len(hashes) == 1


def test_no_refinement_is_plain_sgd_and_its_model_can_be_refined(tmp_path: Path) -> None:
    sgd, swap = tmp_path / "sgd", tmp_path / "swap"
    plain = settings("refine.epochs=0")
    done = swap_hpc("train", "digits", *QUICK, *plain, "--out", sgd, ranks=2)
    assert done.code == 0, done.stderr
    first = result_of(sgd)
    assert first["test_accuracy"]["averaged"] is None and first["test_accuracy"]["groups"] == []
    assert not (sgd / "swap.safetensors").exists()
    start = settings("large_batch.epochs=0", f"model.weights={sgd}/large_batch.safetensors")
    done = swap_hpc("train", "digits", *QUICK, *start, "--out", swap, ranks=2)
    assert done.code == 0, done.stderr
    second = result_of(swap)
    assert second["test_accuracy"]["large_batch"] == first["test_accuracy"]["large_batch"]
    assert second["epochs"] == {"large_batch": 0, "refine": 1}
    assert second["train_accuracy"]["large_batch"] is None


def test_phase_2_makes_no_mpi_call(tmp_path: Path) -> None:
    """MPI's profiling interface counts all calls of the program, Horovod's thread included."""
    library = tmp_path / "mpi_calls.so"
    subprocess.run([_mpicc(), "-shared", "-fPIC", "-o", library, HERE / "mpi_calls.c"], check=True)
    program = (sys.executable, HERE / "count_calls.py")
    line = ("train", "digits", *QUICK, "--out", str(tmp_path / "out"))
    done = command(*program, *line, ranks=2, variables={"LD_PRELOAD": str(library)})
    assert done.code == 0, done.stderr
    large_batch = re.findall(r"^large_batch calls (\d+)", done.stdout, flags=re.MULTILINE)
    refine = [line for line in done.stdout.splitlines() if line.startswith("refine calls")]
    assert len(large_batch) == 2 and min(map(int, large_batch)) > 50  # the counter does count
    assert refine == ["refine calls 0 Horovod False"] * 2


def _mpicc() -> str:
    import shutil

    own = BIN / "mpicc"
    return str(own) if own.exists() else shutil.which("mpicc") or "mpicc"


def test_recipes_are_listed_and_shown() -> None:
    done = swap_hpc("recipes")
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    assert done.code == 0 and listed == list(shipped_recipes())
    shown = swap_hpc("recipes", "digits")
    assert shown.stdout.strip() == shipped_recipes()["digits"].read_text().strip()
    message = f"no recipe 'digit'; choose one of {', '.join(shipped_recipes())}"
    assert swap_hpc("recipes", "digit").ours == [f"swap-hpc: {message}"]


def test_the_version_is_printed() -> None:
    assert swap_hpc("--version").stdout == f"swap_hpc {__version__}\n"


def test_doctor_answers_the_first_questions_of_a_user() -> None:
    done = swap_hpc("doctor", "--groups", "2", ranks=4)
    assert done.code == 0, done.stderr
    for expected in (
        "thread level multiple",
        "Horovod: mpi yes",
        "nvidia-dali",
        "grid: 4 ranks on 1 node, 2 groups",
        "no problem found",
    ):
        assert expected in done.stdout
    assert sum(line.startswith("rank ") for line in done.stdout.splitlines()) == 4
    timed = [line for line in done.stdout.splitlines() if line.startswith("allreduce of 4 MiB")]
    assert [line.split()[5].rstrip(":") for line in timed] == ["world", "group", "peers"]
    assert all(float(line.split()[-2]) > 0 for line in timed)


def test_a_launcher_that_mpi_does_not_know_is_named(tmp_path: Path) -> None:
    """The mpirun of another MPI sets variables of 4 ranks, but each process is a world of one."""
    variables = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}
    done = swap_hpc("doctor", variables=variables)
    mismatch = "launcher and MPI library do not match"
    worlds = "Open MPI's mpirun started 4 ranks, but MPI sees a world of 1"
    assert f"PROBLEM: {worlds}: {mismatch}" in done.stdout
    refused = swap_hpc("train", "digits", "--out", tmp_path, variables=variables)
    assert refused.code == 2 and mismatch in refused.ours[0]
    variables["OMPI_COMM_WORLD_RANK"] = "1"
    silent = swap_hpc("train", "digits", "--out", tmp_path, variables=variables)
    assert silent.code == 2 and silent.ours == []


LOADED = """
import sys
from swap_hpc import __main__ as cli
heavy = ("torch._dynamo", "sklearn", "scipy", "matplotlib", "torchvision")
try:
    cli.main()
except SystemExit:
    print([name for name in heavy if name in sys.modules])
"""


def test_a_run_imports_nothing_heavy_that_it_does_not_need(tmp_path: Path) -> None:
    small = settings("groups=2", "model.width=4", "large_batch.epochs=1", "refine.epochs=1")
    line = ("train", "digits", "--out", str(tmp_path / "run"), *small)
    done = command(sys.executable, "-c", LOADED, *line, ranks=2)
    assert done.code == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("[")] == ["[]", "[]"]
