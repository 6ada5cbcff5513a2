"""`swap-hpc ...` with short waits: an owner on another host is dead after 3 s without a heartbeat.

python hasty.py train digits ...
"""

from swap_hpc import __main__ as cli
from swap_hpc.run import lock
from swap_hpc.run.taking import Rhythm

if __name__ == "__main__":
    lock.RHYTHM = Rhythm(heartbeat=0.5, patience=1.0, standstill=3.0)
    cli.main()
