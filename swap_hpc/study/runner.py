"""Running the trials of a study, one after the other. Imports neither torch nor MPI."""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from swap_hpc.errors import RunError, Stopped, UserError
from swap_hpc.parallel.launcher import launch_line
from swap_hpc.study.trial import Trial

PR_SET_PDEATHSIG = 1  # of prctl(2)

Kind = Literal["search", "run", "timed run"]

STOPPED = "the study was stopped on request, all is saved: start it again to go on"


@dataclass
class _Stop:
    """The state that a study shares with its signal handlers."""

    asked: bool = False
    process: subprocess.Popen[bytes] | None = None  # the trial under way

    def ask(self, *_: object) -> None:
        self.asked = True
        if self.process:
            # the signal on which a run saves and stops
            self.process.send_signal(signal.SIGUSR1)


@contextmanager
def _stops() -> Iterator[_Stop]:
    """Handle the signals that ask for a stop, until the context ends."""
    stop = _Stop()
    asking = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, stop.ask) for number in asking}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_trials(trials: Sequence[Trial], launcher: str, kind: Kind) -> Iterator[Trial]:
    """Run the trials that are not complete yet, and yield every trial at its end.

    In a search, a trial with a rate may diverge. Any other trial that does ends the study.

    Args:
        trials: in the order in which they run.
        launcher: the command line that starts the ranks, with `{ranks}` for their number, and
            `{network}` for the name of a network where the trials have one.
        kind: what the trials are for, which is shown.

    Raises:
        RunError: a trial failed.
        UserError: a trial refused its input.
        Stopped: a signal asked for it.
    """
    with _stops() as stop:
        for number, trial in enumerate(trials, 1):
            ended = trial.result is not None or (kind == "search" and trial.diverged)
            if not ended:
                print(f"\n{kind} {number} of {len(trials)}: {_described(trial)}", flush=True)
                code = _launch(trial, launcher, stop)
                _check_end(trial, code, kind)
            yield trial
            if stop.asked:
                raise Stopped(STOPPED)


def _described(trial: Trial) -> str:
    rate = f", rate {trial.rate:g}" if trial.rate is not None else ""
    network = f", network {trial.network.name}" if trial.network else ""
    return f"{trial.name}, seed {trial.recipe.seed}{rate}{network}"


def _check_end(trial: Trial, code: int, kind: Kind) -> None:
    """Raise the error with which the study ends after a trial that failed."""
    if code == 0:
        # a launcher that lost a node may return 0 all the same
        if trial.result is None:
            raise RunError(
                f"the study ends at {trial.folder}, which ended without a result: "
                "start it again to go on"
            )
        return
    may_diverge = kind == "search" and trial.rate is not None
    if not (may_diverge and trial.diverged):
        error = UserError if code == 2 else RunError
        raise error(
            f"the study ends at {trial.folder} (exit code {code}, see above): "
            "start it again to go on"
        )


def _launch(trial: Trial, launcher: str, stop: _Stop) -> int:
    """Run a trial and return its exit code.

    Raises:
        Stopped: the trial was stopped before its end.
        UserError: the launcher cannot be started.
    """
    network = trial.network.name if trial.network else ""
    start = launch_line(launcher.replace("{network}", network), trial.ranks)
    trial.record_network()
    line = [*start, sys.executable, "-m", "swap_hpc", *trial.line]
    # A session of its own keeps a terminal's Ctrl-C from the trial, which would end without
    # saving: `_Stop.ask` sends it the signal that lets it save.
    stop.process = subprocess.Popen(line, start_new_session=True, preexec_fn=_end_with_the_study)
    if stop.asked:  # while the trial was being started
        stop.ask()
    code = stop.process.wait()
    stop.process = None
    # MPICH's mpirun may return 0 after a stop
    stopped = stop.asked and (code != 0 or trial.result is None)
    if code == 75 or stopped:
        raise Stopped(STOPPED)
    return code


def _end_with_the_study() -> None:
    """Let the kernel end the launcher when the study is killed.

    A study that is started again would else find the first trial still at work.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
