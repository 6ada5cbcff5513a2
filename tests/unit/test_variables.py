"""Environment variables that others set, and set in ways of their own."""

import os

import pytest

from swap_hpc.errors import UserError
from swap_hpc.parallel.devices import choose_device
from swap_hpc.parallel.launcher import VARIABLES, launched
from swap_hpc.parallel.teams import Team


def threads(monkeypatch: pytest.MonkeyPatch, told: str | None) -> int:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.delenv("OMP_NUM_THREADS") if told is None else monkeypatch.setenv(
        "OMP_NUM_THREADS", told
    )
    return choose_device(Team.alone(), "cpu").threads


@pytest.mark.parametrize(
    ("told", "expected"),
    [("2,1", 2), ("4, 2 ,1", 4), (" 7 ", 7), ("016", 16), ("", 3), ("  ", 3), (None, 3)],
)
def test_threads_are_the_first_of_openmps_list_or_all_cores(
    told: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert threads(monkeypatch, told) == expected


@pytest.mark.parametrize(
    "told",
    ["many", "0", "-1", "1.5", ",2", "2 1", "0x4", "1_0", "²", "99999999999999999999", "$CPUS"],
)
def test_what_is_no_number_of_threads_is_named(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as raised:
        threads(monkeypatch, told)
    assert (
        str(raised.value)
        == f"OMP_NUM_THREADS={told} is no number of threads: export OMP_NUM_THREADS=1, say, or unset it"
    )


@pytest.mark.parametrize("names", VARIABLES.values(), ids=VARIABLES)
@pytest.mark.parametrize("told", ["", "x", "-1", "1.0", " 1", "²"])
def test_a_rank_that_is_no_number_is_no_launchers(
    names: tuple[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in VARIABLES.values():
        for name in each:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(names[0], "0")
    monkeypatch.setenv(names[1], "1")
    assert (found := launched()) and (found.rank, found.size) == (0, 1)
    monkeypatch.setenv(names[0], told)
    assert launched() is None
