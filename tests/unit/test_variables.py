"""Environment variables that users, sites and launchers set in various ways."""

import os

import pytest

from swap_hpc.errors import UserError
from swap_hpc.parallel.devices import choose_device
from swap_hpc.parallel.launcher import VARIABLES, launched
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


@pytest.mark.parametrize("names", VARIABLES.values(), ids=VARIABLES)
@pytest.mark.parametrize("value", ["", "x", "-1", "1.0", " 1", "²"])
def test_a_rank_that_is_not_a_number_comes_from_no_launcher(
    names: tuple[str, str], value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, size = names
    for each in VARIABLES.values():
        for name in each:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(rank, "0")
    monkeypatch.setenv(size, "1")
    found = launched()
    assert found and (found.rank, found.size) == (0, 1)
    monkeypatch.setenv(rank, value)
    assert launched() is None
