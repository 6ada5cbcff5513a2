"""How a job reports from one rank, and how all of its ranks end."""

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, NoReturn

from swap_hpc.parallel.launcher import PARENT, certain_rank, mpi_is_started
from swap_hpc.train.control import ignore_stops

LAUNCHER_SECONDS = 15  # for a launcher to end after it was told to end all ranks


def say(text: str) -> None:
    """Print a line, from the first rank."""
    if _rank() == 0:
        print(text, flush=True)


def tell_launcher(state: Literal["preparing", "training", "stopped", "done"]) -> None:
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


def fail_in_thread(text: str, details: Callable[[], object] | None = None) -> NoReturn:
    """End all ranks with exit code 3, as `fail` does, from a thread that is not the main one.

    Other ranks may be on a host that is lost. Open MPI's launcher would wait for that host until
    TCP gives it up, which takes a quarter of an hour: it is ended, too.
    """
    late = threading.Timer(15, os._exit, [3])  # where MPI cannot end the job any more
    late.daemon = True
    late.start()
    _end_launcher_later()
    try:
        fail(3, text, details=details)
    finally:
        os._exit(3)


# Kills a process, unless it has ended by then and its number belongs to another.
_KILL_LATER = """
sleep {seconds}
if [ "$(cut -d ' ' -f 22 /proc/{process}/stat)" = {start} ]; then kill -KILL {process}; fi
"""


def _end_launcher_later() -> None:
    """Start a process that kills the `mpirun` of this rank, where it does not end by itself."""
    with suppress(OSError, IndexError):
        name, start = _name_and_start(PARENT)
        if name in ("prterun", "mpirun", "mpiexec", "orterun"):
            script = _KILL_LATER.format(seconds=LAUNCHER_SECONDS, process=PARENT, start=start)
            # In a session of its own it outlives this rank, which the launcher kills.
            subprocess.Popen(
                ["sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )


def _name_and_start(process: int) -> tuple[str, str]:
    """Return a process's name, and when it started, in clock ticks since the boot."""
    text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    before, _, after = text.rpartition(") ")
    return before.partition("(")[2], after.split()[19]


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
