"""The errors that end in one clear line instead of a traceback."""


class UserError(ValueError):
    """The input is wrong; the message says what and how to mend it. Exit code 2."""

    said_elsewhere = False  # raised here because another rank raised it, and that one speaks


class RunError(RuntimeError):
    """The run failed in a way that a line explains (a non-finite loss, an unreadable image). Exit code 3."""

    said_elsewhere = False


class Diverged(RunError):
    """A loss or a weight is not finite: another start would end at the same place."""

    FILE = "diverged.json"  # that it leaves in the run's folder


class Stopped(Exception):
    """The run was asked to stop, by a signal, and everything is saved; raised on all ranks. Exit code 75 (EX_TEMPFAIL)."""


def explained(error: Exception) -> Exception:
    """A UserError, of one line, for torch's error where a GPU's memory is full; any other error as it is.

    Another start would end at the same place.
    """
    if type(error).__name__ != "OutOfMemoryError":  # torch need not be loaded
        return error
    why = " ".join(str(error).split())[:100]
    return UserError(
        f"the GPU's memory is full ({why}): smaller batches, or large_batch.accumulate and refine.accumulate, which take them in parts"
    )
