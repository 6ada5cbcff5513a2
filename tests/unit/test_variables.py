"""Environment variables that users, sites and launchers set in various ways."""

import os

import pytest

from swap_hpc.errors import UserError
from swap_hpc.parallel.devices import choose_device
from swap_hpc.parallel.launcher import (
    TORCH,
    TORCH_VARIABLES,
    VARIABLES,
    Launched,
    certain_rank,
    launched,
    refusal,
)
from swap_hpc.parallel.teams import Team


def threads(monkeypatch: pytest.MonkeyPatch, value: str | None) -> int:
    """Return a rank's number of threads on 3 cores, with OMP_NUM_THREADS set to `value`."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    if value is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    return choose_device(Team.alone(), "cpu").threads


@pytest.mark.parametrize(
    ("value", "expected"),
    [("2,1", 2), ("4, 2 ,1", 4), (" 7 ", 7), ("016", 16), ("", 3), ("  ", 3), (None, 3)],
)
def test_threads_are_the_first_of_openmps_list_or_all_cores(
    value: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert threads(monkeypatch, value) == expected


@pytest.mark.parametrize(
    "value",
    ["many", "0", "-1", "1.5", ",2", "2 1", "0x4", "1_0", "²", "99999999999999999999", "$CPUS"],
)
def test_what_is_no_number_of_threads_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as raised:
        threads(monkeypatch, value)
    hint = "export OMP_NUM_THREADS=1, say, or unset it"
    assert str(raised.value) == f"OMP_NUM_THREADS={value} is no number of threads: {hint}"


OTHERS = ("TORCHELASTIC_RUN_ID", "SLURM_TASK_PID")  # what else tells of a launcher


def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove what launchers set."""
    for names in (*VARIABLES.values(), *TORCH_VARIABLES, OTHERS):
        for name in names:
            monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("names", [*VARIABLES.values(), *TORCH_VARIABLES])
@pytest.mark.parametrize("value", ["", "x", "-1", "1.0", " 1", "²"])
def test_a_rank_that_is_not_a_number_comes_from_no_launcher(
    names: tuple[str, str], value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, size = names
    clean(monkeypatch)
    monkeypatch.setenv(rank, "0")
    monkeypatch.setenv(size, "2")
    found = launched()
    assert found and (found.rank, found.size) == (0, 2)
    monkeypatch.setenv(rank, value)
    assert launched() is None


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, 0),  # exported by a user, say
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 1),
        ({"RANK": "3", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}, 3),
        ({"RANK": "3", "WORLD_SIZE": "4", "PMI_RANK": "1", "PMI_SIZE": "2"}, 1),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, 0),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_TASK_PID": "999999999"}, 0),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_TASK_PID": "SELF"}, 1),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_TASK_PID": "PARENT"}, 1),
    ],
)
def test_only_a_launcher_that_started_a_process_keeps_it_silent(
    variables: dict[str, str], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean(monkeypatch)
    numbers = {"SELF": str(os.getpid()), "PARENT": str(os.getppid())}
    for name, value in variables.items():
        monkeypatch.setenv(name, numbers.get(value, value))
    assert certain_rank() == rank


def test_a_refusal_names_what_mpi_sees_and_what_to_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    clean(monkeypatch)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = launched()
    assert found and "and MPI sees each of them alone: start" in refusal(found, 1)
    assert "(WORLD_SIZE=4), and MPI sees a world of 2: start" in refusal(found, 2)
    assert refusal(found, 1).endswith("; where its variables are left over, unset RANK WORLD_SIZE")


MPIRUN, SRUN = "Open MPI's mpirun", "srun"


@pytest.mark.parametrize(
    ("of_mpi", "of_torch", "expected"),
    [
        (None, (1, 4), TORCH),
        (None, (0, 1), None),  # a lone process, or variables that are left over
        ((MPIRUN, 3, 4), (3, 4), MPIRUN),  # set by `distributed_environment`
        ((MPIRUN, 3, 4), (1, 2), MPIRUN),  # mpirun in a shell with variables that are left over
        ((MPIRUN, 1, 2), (9, 16), TORCH),  # a torchrun on each of two nodes
        ((SRUN, 1, 2), (9, 16), TORCH),
        ((SRUN, 3, 8), (1, 2), TORCH),  # eight jobs of torchrun
        ((SRUN, 0, 1), (0, 1), SRUN),
    ],
)
def test_the_launcher_is_the_one_that_is_nearest(
    of_mpi: tuple[str, int, int] | None,
    of_torch: tuple[int, int],
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clean(monkeypatch)
    by_name = {TORCH: of_torch}
    if of_mpi:
        name, *place = of_mpi
        by_name[name] = (place[0], place[1])
    for name, (rank, size) in by_name.items():
        names = TORCH_VARIABLES[0] if name == TORCH else VARIABLES[name]
        monkeypatch.setenv(names[0], str(rank))
        monkeypatch.setenv(names[1], str(size))
    if of_mpi != (MPIRUN, 3, 4):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launched() == (Launched(expected, *by_name[expected]) if expected else None)
