"""One rank of a bench: `python -m swap_hpc.bench NAME FILE`, started by `swap-hpc bench`."""

import sys
from pathlib import Path

from swap_hpc.bench import work

work(sys.argv[1], Path(sys.argv[2]))
