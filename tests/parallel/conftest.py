"""Tests that run on several MPI ranks at once.

A test takes the fixture `world` and is one item per number of ranks. Plain pytest starts one `mpirun` per number, which
runs all of that number's tests (importing torch on every rank is what costs); each item then reports what every rank
said of it. Under that mpirun a failing rank ends the others, which may wait for it in a collective.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import command

from swap_hpc.parallel.mpi import abort
from swap_hpc.parallel.teams import Team

INSIDE = "SWAP_HPC_TEST_RANKS"  # set by the outer pytest: the number of ranks of this mpirun
REPORTS = "SWAP_HPC_TEST_REPORTS"  # a folder, one file of JSON lines per rank
HERE = Path(__file__).parent
MINUTES = 12  # for one mpirun


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "world" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("ranks")
        counts = marker.args if marker else (1, 2, 3, 4)
        values = [
            pytest.param(n, id=f"{n} ranks", marks=[pytest.mark.mpi] if n == 2 else [])
            for n in counts
        ]
        metafunc.parametrize("world", values, indirect=True)


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[Team | None]:
    yield Team.world() if INSIDE in os.environ else None


def _ranks(item: pytest.Item) -> int | None:
    return item.callspec.params.get("world") if hasattr(item, "callspec") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INSIDE in os.environ:
        items[:] = [item for item in items if _ranks(item) == int(os.environ[INSIDE])]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    ranks = _ranks(pyfuncitem)
    if INSIDE in os.environ or ranks is None:
        return None
    launched = pyfuncitem.session.stash.setdefault(_LAUNCHED, {})
    if ranks not in launched:
        wanted = [item.nodeid for item in pyfuncitem.session.items if _ranks(item) == ranks]
        launched[ranks] = _launch(ranks, wanted, pyfuncitem.config.rootpath)
    said, output = launched[ranks]
    _judge(said.get(pyfuncitem.nodeid, {}), ranks, output)
    return True


_LAUNCHED = pytest.StashKey[dict[int, tuple[dict[str, dict[int, tuple[str, str]]], str]]]()


def _launch(
    ranks: int, items: list[str], root: Path
) -> tuple[dict[str, dict[int, tuple[str, str]]], str]:
    """What each rank said of each item, (outcome, text), and the output of the whole."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *items]
        done = command(
            *line,
            ranks=ranks,
            timeout=60 * MINUTES,
            cwd=root,
            variables={INSIDE: str(ranks), REPORTS: folder},
        )
        said: dict[str, dict[int, tuple[str, str]]] = {}
        for path in Path(folder).iterdir():
            for text in path.read_text().splitlines():
                entry = json.loads(text)
                said.setdefault(entry["item"], {})[int(path.stem)] = (
                    entry["outcome"],
                    entry["text"],
                )
    return said, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def _judge(said: dict[int, tuple[str, str]], ranks: int, output: str) -> None:
    for rank, (outcome, text) in said.items():
        if outcome == "skipped":
            pytest.skip(text)
        if outcome == "failed":
            pytest.fail(f"on rank {rank} of {ranks}:\n{text}", pytrace=False)
    if len(said) < ranks:
        pytest.fail(
            f"ran on {len(said)} of {ranks} ranks only; the mpirun said:\n{output}", pytrace=False
        )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if INSIDE not in os.environ or (report.when != "call" and report.passed):
        return
    rank = Team.world().rank
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
    with open(Path(os.environ[REPORTS]) / f"{rank}.jsonl", "a", encoding="utf-8") as file:
        file.write(
            json.dumps({"item": report.nodeid, "outcome": report.outcome, "text": text}) + "\n"
        )
    if report.failed:
        abort(1)
