"""Ranks that torch's launchers start: the library works on them, the commands refuse them."""

import re
import sys
from pathlib import Path

import pytest
from launch import BIN, Finished, command, swap_hpc, torchrun

EXAMPLES = Path(__file__).parents[1] / "examples"
ROOT = EXAMPLES.parents[1]

# What the library does not need on torch.distributed's ranks.
UNNEEDED = ("horovod", "mpi4py", "nvidia/dali")


def end_of(example: str, launcher: tuple[str, ...], **how: object) -> str:
    """Return the line with which an example ends, under a launcher."""
    done = command(*launcher, f"tests/examples/{example}", cwd=ROOT, **how)  # type: ignore[arg-type]
    assert done.code == 0, done.stderr
    return done.stdout


@pytest.fixture
def without(tmp_path: Path) -> dict[str, str]:
    """Return variables with which some packages cannot be imported."""
    for package in UNNEEDED:
        module = tmp_path / package / "__init__.py"
        module.parent.mkdir(parents=True)
        module.write_text(f"raise ModuleNotFoundError('{package} is not installed')\n")
    (tmp_path / "nvidia" / "__init__.py").write_text("")
    return {"PYTHONPATH": f"{tmp_path}:{ROOT}"}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_torchruns_ranks_end_with_the_weights_of_mpiruns(
    ranks: int, without: dict[str, str]
) -> None:
    """Under torchrun neither MPI nor Horovod nor DALI can be imported."""
    by_torch = end_of("ddp_loop.py", torchrun(ranks), variables=without)
    by_mpi = end_of("ddp_loop.py", (sys.executable, "-m", "mpi4py"), ranks=ranks)
    assert by_torch == by_mpi
    line = re.fullmatch(r"accuracy (.*), weights_sha256 [0-9a-f]{64}\n", by_mpi)
    assert line and float(line[1]) > 0.9


def test_a_lightning_module_ends_alike_under_both(without: dict[str, str]) -> None:
    by_torch = end_of("lightning_module.py", torchrun(2), variables=without)
    by_mpi = end_of("lightning_module.py", (sys.executable, "-m", "mpi4py"), ranks=2)
    assert by_torch == by_mpi and float(by_mpi.split()[1].rstrip(",")) > 0.9


def test_four_copies_end_alike_on_any_number_of_ranks() -> None:
    alone = end_of("grid_loop.py", (sys.executable,))
    assert float(alone.split()[1].rstrip(",")) > 0.9
    assert end_of("grid_loop.py", torchrun(4)) == alone
    assert end_of("grid_loop.py", (sys.executable, "-m", "mpi4py"), ranks=2) == alone


LATE = """
import datetime, os, time
import torch
from pathlib import Path
from torch import distributed
from swap_hpc import Team, average_weights_

Path(f"imported-{os.environ['RANK']}").touch()
while not all(Path(f"imported-{rank}").exists() for rank in (0, 1)):
    time.sleep(0.01)
distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
if distributed.get_rank() == 1:
    time.sleep(4)
world = Team.world()
model = torch.nn.Linear(1, 1)
time.sleep(4 * world.rank)
average_weights_(model, world)
distributed.destroy_process_group()
assert world.sums(1) == [2]  # the team outlives the process group
print("averaged", flush=True)
if world.rank == 1:
    raise ValueError("a fault of rank 1's")
world.barrier()
"""


def test_a_rank_may_be_late_and_one_that_fails_ends_all(tmp_path: Path) -> None:
    """A group's refinement takes longer than a process group waits, here 2 seconds."""
    (tmp_path / "late.py").write_text(LATE)
    done = command(*torchrun(2), tmp_path / "late.py", cwd=tmp_path)
    assert done.stdout.splitlines() == 2 * ["averaged"]
    assert done.code == 1 and "a fault of rank 1's" in done.stderr


SPAWNED = """
import sys
import torch
from torch import distributed, multiprocessing
from swap_hpc import Team

def run(rank, file):
    distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    sys.stdout.write(f"{Team.world().allgather(rank)}\\n")  # in one piece

multiprocessing.start_processes(run, sys.argv[1:], nprocs=2, start_method="fork")
"""


def test_processes_that_a_program_starts_itself_are_a_world(tmp_path: Path) -> None:
    done = command(sys.executable, "-c", SPAWNED, tmp_path / "store")
    assert done.stdout == 2 * "[0, 1]\n", done.stderr


REFUSED = "torchrun or the like started 2 ranks (WORLD_SIZE=2), and MPI sees each of them alone"


def test_torchrun_of_a_command_ends_with_one_line_and_code_2(tmp_path: Path) -> None:
    done = command(*torchrun(2), BIN / "swap-hpc", "train", "digits", cwd=tmp_path)
    assert len(done.ours) == 1 and REFUSED in done.ours[0] and "mpirun -n 2" in done.ours[0]
    assert done.code == 1  # torchrun's own; its report has the ranks'
    codes = re.findall(r"exitcode +: (-?\d+)", done.stderr)
    assert "2" in codes and set(codes) <= {"2", "-15"}  # torchrun may end the other one first
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def with_ranks(*arguments: str, rank: int = 0, size: int = 2) -> Finished:
    """Start a command with the variables of torch's launchers: torchrun, accelerate, DeepSpeed."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    return swap_hpc(*arguments, variables=place)


@pytest.mark.parametrize(
    "line",
    [
        "train digits",
        "average RUN",
        "evaluate FILE.safetensors",
        "landscape RUN",
        "trajectory RUN",
        "data digits",
        "pack SRC DST",
        "bench checkpoint",
    ],
)
def test_every_command_that_starts_mpi_refuses_such_ranks(line: str) -> None:
    done = with_ranks(*line.split())
    assert done.code == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and REFUSED in done.ours[0]


def test_the_line_comes_from_one_rank() -> None:
    done = with_ranks("train", "digits", rank=1)
    assert done.code == 2 and done.stdout == done.stderr == ""


@pytest.mark.parametrize("line", ["study cifar10-table", "bench average"])
def test_what_starts_ranks_itself_refuses_to_be_started_on_several(line: str) -> None:
    done = with_ranks(*line.split())
    name = line.split()[0]
    assert done.code == 2 and len(done.stderr.splitlines()) == 1
    assert f"{name} starts its ranks itself: start swap-hpc {name} alone" in done.ours[0]


def test_doctor_names_the_launcher() -> None:
    done = with_ranks("doctor")
    assert f"PROBLEM: {REFUSED}" in done.stdout, done.stderr


LEFT_OVER = [
    {"RANK": "1", "WORLD_SIZE": "2"},
    {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
]


@pytest.mark.parametrize("variables", LEFT_OVER)
def test_variables_that_are_left_over_keep_no_command_silent(variables: dict[str, str]) -> None:
    assert "digits" in swap_hpc("recipes", variables=variables).stdout
    for line in (("average", "nowhere"), ("unheard-of",)):
        done = swap_hpc(*line, variables=variables)
        assert done.code == 2 and len(done.ours) == 1, done.stderr
    assert f"unset {' '.join(variables)}" in swap_hpc("doctor", variables=variables).stdout


def test_doctor_speaks_on_every_rank_that_is_alone() -> None:
    assert f"PROBLEM: {REFUSED}" in with_ranks("doctor", rank=1).stdout


def test_a_rank_of_another_world_is_told_what_mpi_sees() -> None:
    program = "from swap_hpc import Team; Team.world()"
    variables = {"RANK": "0", "WORLD_SIZE": "4"}
    done = command(sys.executable, "-c", program, ranks=2, variables=variables)
    assert done.code and "(WORLD_SIZE=4), and MPI sees a world of 2" in done.stderr
    assert "unset RANK WORLD_SIZE" in done.stderr


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("horovodrun", {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}),
        ("IBM's jsrun", {"JSM_NAMESPACE_RANK": "0", "JSM_NAMESPACE_SIZE": "2"}),
        ("Flux", {"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "2"}),
        ("MVAPICH's mpirun_rsh", {"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "2"}),
    ],
)
def test_ranks_of_a_launcher_that_mpi_does_not_know_are_refused(
    name: str, variables: dict[str, str]
) -> None:
    done = swap_hpc("data", "digits", variables=variables)
    assert done.code == 2 and len(done.ours) == 1
    assert f"{name} started 2 ranks, but MPI sees a world of 1" in done.ours[0]


def test_srun_without_pmi_is_refused() -> None:
    place = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}
    done = swap_hpc("train", "digits", variables=place)
    assert done.code == 2 and len(done.ours) == 1
    assert "srun started 4 ranks, but MPI sees a world of 1" in done.ours[0]
    assert "with srun: --mpi=" in done.ours[0]


def test_variables_that_are_left_over_do_no_harm() -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    same = {"RANK": "0", "WORLD_SIZE": "2"}
    for done in (
        swap_hpc("data", "digits", variables=alone),
        swap_hpc("data", "digits", variables=same, ranks=2),
    ):
        assert done.code == 0 and done.stdout == "digits: comes with the package\n", done.stderr
