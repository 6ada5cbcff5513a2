"""Settings of all tests: one thread per process, and no GPU except for the tests of GPUs."""

import os
import re
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several ranks have to fit on two cores

GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU from this process and its children unless only the tests of GPUs run.

    The other tests expect the losses and times of CPUs. CUDA reads the variable once, so that one
    session cannot do both.
    """
    chosen = [
        Path(config.invocation_params.dir, argument.partition("::")[0]).resolve()
        for argument in config.args
    ]
    if not all(path == GPU_TESTS or GPU_TESTS in path.parents for path in chosen):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """With `-n 2`, give each process whole files, and all items of one number of ranks."""
    return _Scheduling(config, log)


class _Scheduling(LoadScopeScheduling):
    """Keep together what shares something: the fixtures of a file, an `mpirun`."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if file.startswith("tests/parallel/") and (ranks := re.search(r"\d+ ranks", nodeid)):
            return ranks[0]
        return file
