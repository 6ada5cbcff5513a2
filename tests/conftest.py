"""Settings of all tests: one thread per process, and no GPU except for the tests of GPUs."""

import os
from pathlib import Path

import pytest

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
    # An environment for users, as on a host with GPUs, may have pytest alone.
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.import_plugin("scheduling")
