"""For all tests: one thread per process, so that several ranks fit on two cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
