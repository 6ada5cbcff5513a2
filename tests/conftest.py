"""For all tests: one thread per process, so that several ranks fit on two cores, and no GPU but for the tests of GPUs."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_configure(config: pytest.Config) -> None:
    """Hides the GPU from these processes, and those that they start, unless nothing but its own tests runs.

    Losses and times are those of CPUs elsewhere. CUDA looks once, so that one session cannot do both.
    """
    chosen = [
        Path(config.invocation_params.dir, argument.partition("::")[0]).resolve()
        for argument in config.args
    ]
    if not all(path == GPU_TESTS or GPU_TESTS in path.parents for path in chosen):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
