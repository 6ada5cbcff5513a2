"""`python -m swap_hpc.bench NAME FILE`, as `swap-hpc bench` starts it on every rank."""

import sys
from pathlib import Path

from swap_hpc.bench import work

work(sys.argv[1], Path(sys.argv[2]))
