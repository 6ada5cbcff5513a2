"""How a job reports from one rank, and how all of its ranks end."""

import os
import select
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, NoReturn

from swap_hpc.parallel.launcher import certain_rank, mpi_is_started
from swap_hpc.train.control import ignore_stops


def say(text: str) -> None:
    """Print a line, from the first rank."""
    if _rank() == 0:
        print(text, flush=True)


def tell_launcher(state: Literal["training", "stopped", "done"]) -> None:
    """Write how far the job has come into the file that the variable SWAP_HPC_STATE names.

    Batch scripts set it, because some launchers do not pass the ranks' exit code on.
    """
    if _rank() == 0:
        _write_state("w", state)


def _write_state(mode: Literal["w", "a"], text: str) -> None:
    if "SWAP_HPC_STATE" in os.environ:
        with suppress(OSError), open(os.environ["SWAP_HPC_STATE"], mode, encoding="utf-8") as file:
            file.write(text)


def _rank() -> int:
    """Return this process's rank.

    It comes from MPI where MPI was started, else from the launcher's environment, so that
    commands on a login node need no MPI.
    """
    if mpi_is_started():
        from swap_hpc.parallel import mpi

        # A world of one under a launcher of several is another MPI's: the launcher knows better.
        if mpi.world_size() > 1:
            return mpi.world_rank()
    return certain_rank()


def fail(
    code: int,
    text: str,
    reported_elsewhere: bool = False,
    details: Callable[[], object] | None = None,
) -> NoReturn:
    """Print an error on stderr, from one rank, and end all ranks, also those without an error.

    Where all ranks fail alike, the first one reports and ends the others, which wait for that.

    Args:
        code: the exit code of the job.
        text: the error; nothing is printed where it is empty.
        reported_elsewhere: another rank prints it.
        details: writes more on stderr, after the text.
    """
    rank = _rank()
    # The first rank's abort must reach a rank before that one reports, too.
    if reported_elsewhere:
        time.sleep(10)
    elif rank:
        time.sleep(1 + 0.4 * min(rank, 8))
    alone = not mpi_is_started()
    if not alone:
        from swap_hpc.parallel import mpi

        alone = mpi.world_size() == 1
    if text and not reported_elsewhere and (rank == 0 or not alone):
        print(text, file=sys.stderr, flush=True)
        if details:
            details()
        _write_state("a", f"\nfailed with {code}")
    if not alone:
        time.sleep(0.2)  # an abort may make the launcher drop output that it has not forwarded yet
        mpi.abort(code)
    ignore_stops()
    sys.exit(code)


def nobody_reads() -> bool:
    """Return whether the reader of this process's output has gone away, as `| head` does."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(state & select.POLLERR for _, state in poll.poll(0))


def leave_unheard() -> NoReturn:
    """End the job without a message, because nobody reads its output."""
    # At exit Python flushes the rest of the output, which would fail again in the broken pipe.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    fail(1, "")
