"""Jobs that hold a folder: started, suspended, ended."""

import signal
import subprocess
import sys
from pathlib import Path

from launch import HANG, Finished, launch, settings, wait_for

HASTY = Path(__file__).with_name("hasty.py")
FIELDS = settings("large_batch.epochs=2", "model.width=4", "checkpoint.min_seconds=0")
ENDLESS = (*FIELDS, *settings("refine.epochs=10000"))


def start(out: Path, *options: str, before: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    """Start training on one rank, after the words of another command."""
    return launch(*before, sys.executable, HASTY, "train", "digits", *options, "--out", out)


def saves(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("group-*.safetensors"))


def end_of(job: "subprocess.Popen[str]") -> Finished:
    stdout, stderr = job.communicate(timeout=HANG)
    return Finished(job.returncode, stdout, stderr)


def suspend(job: "subprocess.Popen[str]") -> None:
    """Stop a process as a batch system does that suspends its job."""
    job.send_signal(signal.SIGSTOP)
    stat = Path(f"/proc/{job.pid}/stat")
    wait_for(lambda: ") T " in stat.read_text(encoding="utf-8"), "stopped process", every=0.01)
