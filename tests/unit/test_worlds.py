"""The team of all ranks: whose it is, and when there is none."""

import pytest
from mpi4py import MPI

from swap_hpc import Team, distributed_environment
from swap_hpc.errors import UserError


@pytest.fixture
def by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the variables of the first of two ranks."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


def test_a_world_that_mpi_does_not_see_is_refused(by_torchrun: None) -> None:
    for make in (Team.world, lambda: Team(MPI.COMM_WORLD), lambda: Team(MPI.COMM_WORLD.Dup())):
        with pytest.raises(UserError, match=r"init_process_group\(\) first") as raised:
            make()
        assert "started 2 ranks (WORLD_SIZE=2)" in str(raised.value)
        assert "\n" not in str(raised.value)
    assert Team(MPI.COMM_SELF).size == 1  # meant to be this rank alone


def test_a_team_of_something_else_is_refused() -> None:
    for other in (None, -100, "world"):  # torch gives -100 to a rank outside of a new group
        with pytest.raises(TypeError, match="a ProcessGroup that this rank belongs to, not of"):
            Team(other)  # type: ignore[arg-type]


def test_torchs_variables_are_those_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    found = distributed_environment(Team.alone())
    assert 1024 <= int(found.pop("MASTER_PORT")) < 65536
    assert found == {
        "MASTER_ADDR": "127.0.0.1",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
    }


def test_an_address_that_is_set_is_kept_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29511")
    found = distributed_environment(Team.alone())
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("localhost", "29511")
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    with pytest.raises(UserError, match="by its name, nowhere.invalid: export MASTER_ADDR="):
        distributed_environment(Team.alone())
