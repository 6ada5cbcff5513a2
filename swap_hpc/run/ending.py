"""How a job speaks with one voice, and how all of it ends."""

import os
import select
import sys
import time
from contextlib import suppress
from typing import Literal, NoReturn

from swap_hpc.parallel.launcher import launched
from swap_hpc.train.control import ignore_stops


def say(text: str) -> None:
    if _rank() == 0:
        print(text, flush=True)


def tell_launcher(state: Literal["training", "stopped", "done"]) -> None:
    """Write how far the job came into the file SWAP_HPC_STATE, where a batch script names one: a launcher's exit code may not tell."""
    if _rank() == 0:
        _write_state("w", state)


def _write_state(mode: Literal["w", "a"], text: str) -> None:
    if "SWAP_HPC_STATE" in os.environ:
        with suppress(OSError), open(os.environ["SWAP_HPC_STATE"], mode, encoding="utf-8") as file:
            file.write(text)


def _rank() -> int:
    """This process's rank: by MPI where it was started; else by the launcher's word, so that a login node needs no MPI."""
    told = launched()
    if "swap_hpc.parallel.teams" in sys.modules:
        from swap_hpc.parallel.teams import Team

        world = Team.world()
        if world.size > 1 or told is None:
            return world.rank
    return told.rank if told else 0


def fail(code: int, text: str, said_elsewhere: bool = False) -> NoReturn:
    """Says `text`, from one rank, and ends all ranks, also those that know of no error.

    Where all ranks fail alike the first one speaks and ends the others, which wait for that meanwhile.
    """
    rank = _rank()
    # far enough apart for the first one's abort to reach the next before it speaks
    time.sleep(10 if said_elsewhere else 1 + 0.4 * min(rank, 8) if rank else 0)
    alone = "swap_hpc.parallel.teams" not in sys.modules
    if not alone:
        from swap_hpc.parallel import mpi
        from swap_hpc.parallel.teams import Team

        alone = Team.world().size == 1
    if text and not said_elsewhere and (rank == 0 or not alone):
        print(text, file=sys.stderr, flush=True)
        _write_state("a", f"\nfailed with {code}")
    if not alone:
        time.sleep(0.2)  # the launcher may drop what it has not forwarded yet
        mpi.abort(code)
    ignore_stops()
    sys.exit(code)


def nobody_reads() -> bool:
    """Whether what reads this process's output has gone away, as `| head` does."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(state & select.POLLERR for _, state in poll.poll(0))


def leave_unheard() -> NoReturn:
    """Ends the job without a word: nobody reads them."""
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
    )  # where Python writes what is left, at exit
    fail(1, "")
