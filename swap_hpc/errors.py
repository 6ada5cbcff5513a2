"""The errors that end a job with one clear line instead of a traceback."""

import textwrap


class UserError(ValueError):
    """The input is wrong; the message says what is wrong and how to fix it. Exit code 2."""

    # True on a rank that raises another rank's error: that rank prints the message.
    reported_elsewhere = False


class RunError(RuntimeError):
    """The run failed for a known reason, such as an unreadable image. Exit code 3."""

    reported_elsewhere = False


class Diverged(RunError):
    """A loss or a weight is not finite. A restart would end at the same place."""

    FILE = "diverged.json"  # written to the run's folder, with the reason


class Stopped(Exception):
    """A signal asked the run to stop, and everything is saved. Raised on all ranks.

    Exit code 75, EX_TEMPFAIL of sysexits.h: start the same command again.
    """


def explained(error: Exception) -> Exception:
    """Return a UserError in one line if a GPU's memory is full, and any other error unchanged.

    A restart would run out of memory at the same place, so this is wrong input and not a failure.
    """
    # The name is compared because commands that need no torch must not import it.
    if type(error).__name__ != "OutOfMemoryError":
        return error
    why = textwrap.shorten(str(error), 100, placeholder=" ...")
    return UserError(
        f"the GPU's memory is full ({why}): set smaller batches, or raise large_batch.accumulate "
        "and refine.accumulate, which compute a batch in parts"
    )
