"""Tests that run on several ranks at once, connected by MPI or by torch.distributed.

A test that takes the fixture `world` is one item per number of ranks, and one more per number that
`@pytest.mark.process_groups` names. Plain pytest starts one `mpirun` or `torchrun` per number,
which runs all items of that number: importing torch on every rank is what costs time. Each item
then reports what every rank reported about it. Under that launcher a failing rank ends the others,
which may wait for it in a collective.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
from launch import command, torchrun

from swap_hpc.parallel.teams import Team

INSIDE = "SWAP_HPC_TEST_RANKS"  # set by the outer pytest: the `Start` of this process
REPORTS = "SWAP_HPC_TEST_REPORTS"  # a folder, with one file of JSON lines per rank


class Start(NamedTuple):
    """How ranks are started."""

    ranks: int
    by: Literal["mpirun", "torchrun"] = "mpirun"

    def __str__(self) -> str:
        return f"{self.ranks} ranks" + ("" if self.by == "mpirun" else " of torchrun")


class Report(NamedTuple):
    """What one rank reports about an item."""

    outcome: str
    text: str


class Launched(NamedTuple):
    """A launcher that has ended."""

    reports: dict[str, dict[int, Report]]  # item -> rank -> report
    output: str


_LAUNCHED = pytest.StashKey[dict[Start, Launched]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "world" not in metafunc.fixturenames:
        return
    starts = [Start(n) for n in _marked(metafunc.definition, "ranks", (1, 2, 3, 4))]
    starts += [Start(n, "torchrun") for n in _marked(metafunc.definition, "process_groups", ())]
    values = [
        pytest.param(start, id=str(start), marks=[pytest.mark.mpi] if start == Start(2) else [])
        for start in starts
    ]
    metafunc.parametrize("world", values, indirect=True)


def _marked(item: pytest.Item, marker: str, default: tuple[int, ...]) -> tuple[int, ...]:
    found = item.get_closest_marker(marker)
    return found.args if found else default


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[Team | None]:
    yield Team.world() if INSIDE in os.environ else None


def pytest_configure(config: pytest.Config) -> None:
    """Connect the ranks that torchrun started."""
    if os.environ.get(INSIDE, "").endswith("torchrun"):
        import torch

        torch.distributed.init_process_group("gloo")


def _start(item: pytest.Item) -> Start | None:
    """Return how an item's ranks are started; None for an item that takes no `world`."""
    return item.callspec.params.get("world") if hasattr(item, "callspec") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INSIDE in os.environ:
        items[:] = [item for item in items if str(_start(item)) == os.environ[INSIDE]]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """In the outer pytest, judge an item by its ranks' reports instead of calling its function."""
    start = _start(pyfuncitem)
    if INSIDE in os.environ or start is None:
        return None
    launched = pyfuncitem.session.stash.setdefault(_LAUNCHED, {})
    if start not in launched:
        items = [item.nodeid for item in pyfuncitem.session.items if _start(item) == start]
        launched[start] = _launch(start, items, pyfuncitem.config.rootpath)
    reports = launched[start].reports.get(pyfuncitem.nodeid, {})
    _judge(reports, start.ranks, launched[start].output)
    return True


def _launch(start: Start, items: list[str], root: Path) -> Launched:
    """Run items under one launcher."""
    with tempfile.TemporaryDirectory() as folder:
        by_mpi = start.by == "mpirun"
        launcher = (sys.executable,) if by_mpi else torchrun(start.ranks)
        line = [*launcher, "-m", "pytest", "-q", "-p", "no:cacheprovider", *items]
        variables = {INSIDE: str(start), REPORTS: folder}
        ranks = start.ranks if by_mpi else None
        done = command(*line, ranks=ranks, cwd=root, variables=variables)
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
            f"ran on {len(reports)} of {ranks} ranks only; output of the launcher:\n{output}",
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
    if report.failed and os.environ[INSIDE].endswith("torchrun"):
        os._exit(1)  # torchrun ends the others
    if report.failed:
        from swap_hpc.parallel.mpi import abort

        abort(1)
