"""Tests that run on several MPI ranks at once.

A test that takes the fixture `world` is one item per number of ranks. Plain pytest starts one
`mpirun` per number, which runs all items of that number: importing torch on every rank is what
costs time. Each item then reports what every rank reported about it. Under that mpirun a failing
rank ends the others, which may wait for it in a collective.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from launch import command

from swap_hpc.parallel.mpi import abort
from swap_hpc.parallel.teams import Team

INSIDE = "SWAP_HPC_TEST_RANKS"  # set by the outer pytest: the number of ranks of this mpirun
REPORTS = "SWAP_HPC_TEST_REPORTS"  # a folder, with one file of JSON lines per rank
MINUTES = 12  # time-out of one mpirun


class Report(NamedTuple):
    """What one rank reports about an item."""

    outcome: str
    text: str


class Launched(NamedTuple):
    """An mpirun that has ended."""

    reports: dict[str, dict[int, Report]]  # item -> rank -> report
    output: str


_LAUNCHED = pytest.StashKey[dict[int, Launched]]()  # by the number of ranks


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "world" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("ranks")
    counts = marker.args if marker else (1, 2, 3, 4)
    values = [
        pytest.param(n, id=f"{n} ranks", marks=[pytest.mark.mpi] if n == 2 else []) for n in counts
    ]
    metafunc.parametrize("world", values, indirect=True)


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[Team | None]:
    yield Team.world() if INSIDE in os.environ else None


def _ranks(item: pytest.Item) -> int | None:
    """Return the number of ranks that an item runs on; None for one that takes no `world`."""
    return item.callspec.params.get("world") if hasattr(item, "callspec") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INSIDE in os.environ:
        items[:] = [item for item in items if _ranks(item) == int(os.environ[INSIDE])]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """In the outer pytest, judge an item by its ranks' reports instead of calling its function."""
    ranks = _ranks(pyfuncitem)
    if INSIDE in os.environ or ranks is None:
        return None
    launched = pyfuncitem.session.stash.setdefault(_LAUNCHED, {})
    if ranks not in launched:
        items = [item.nodeid for item in pyfuncitem.session.items if _ranks(item) == ranks]
        launched[ranks] = _launch(ranks, items, pyfuncitem.config.rootpath)
    reports = launched[ranks].reports.get(pyfuncitem.nodeid, {})
    _judge(reports, ranks, launched[ranks].output)
    return True


def _launch(ranks: int, items: list[str], root: Path) -> Launched:
    """Run items under one mpirun."""
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *items]
        variables = {INSIDE: str(ranks), REPORTS: folder}
        done = command(*line, ranks=ranks, timeout=60 * MINUTES, cwd=root, variables=variables)
        reports: dict[str, dict[int, Report]] = {}
        for path in Path(folder).iterdir():
            rank = int(path.stem)
            for text in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(text)
                of_item = reports.setdefault(entry["item"], {})
                of_item[rank] = Report(entry["outcome"], entry["text"])
    return Launched(reports, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def _judge(reports: dict[int, Report], ranks: int, output: str) -> None:
    for rank, (outcome, text) in reports.items():
        if outcome == "skipped":
            pytest.skip(text)
        if outcome == "failed":
            pytest.fail(f"on rank {rank} of {ranks}:\n{text}", pytrace=False)
    if len(reports) < ranks:
        pytest.fail(
            f"ran on {len(reports)} of {ranks} ranks only; output of mpirun:\n{output}",
            pytrace=False,
        )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """On a rank, append an item's report to the rank's file, and end all ranks if it failed."""
    if INSIDE not in os.environ or (report.when != "call" and report.passed):
        return
    rank = Team.world().rank
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
    entry = {"item": report.nodeid, "outcome": report.outcome, "text": text}
    with open(Path(os.environ[REPORTS]) / f"{rank}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    if report.failed:
        abort(1)
