"""Which tests pytest-xdist gives to one process; conftest.py loads this where it is installed."""

import re

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return _Scheduling(config, log)


class _Scheduling(LoadScopeScheduling):
    """Keep together what shares something: the fixtures of a file, an `mpirun`."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if file.startswith("tests/parallel/") and (ranks := re.search(r"\d+ ranks", nodeid)):
            return ranks[0]
        return file
