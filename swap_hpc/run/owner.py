"""The process that owns a run's folder, and what another process knows of its end."""

import json
import os
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from uuid import uuid4


@dataclass(frozen=True)
class Owner:
    """A process that owns, or wants to own, a run's folder."""

    host: str = ""
    process: int = 0  # its number; 0: the file that names the owner cannot be read
    started: int | None = None  # clock ticks from the host's boot to the process's start
    machine: str = ""  # the boot and the namespace in which the process's number has a meaning
    job: str = ""  # the cluster's name and Slurm's number of the job; empty without Slurm
    restarts: int = 0  # how often Slurm has put the job back into the queue
    folder: str = ""  # the `identity_of` the folder: a copy of it has another one
    key: str = field(default_factory=lambda: uuid4().hex)  # of this owner alone

    def to_json(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    def __str__(self) -> str:
        if not self.process:
            return "another job"
        job = f", job {self.job.rpartition(' ')[2]}" if self.job else ""
        return f"process {self.process} on {self.host}{job}"


def this_process() -> Owner:
    """Return this process as an owner, with a new key."""
    job = os.environ.get("SLURM_JOB_ID", "")
    cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return Owner(
        host=platform.node(),
        process=os.getpid(),
        started=_start_of(os.getpid()),
        machine=f"{_boot()} {_namespace()}",
        job=f"{cluster} {job}".strip() if job else "",
        restarts=int(restarts) if restarts.isdecimal() else 0,
    )


def owner_of(text: str, otherwise: str) -> Owner:
    """Return the owner that a file names.

    Args:
        text: of the file.
        otherwise: the key of an unknown owner, whose file holds something else: it was cut off by
            a crash, or is being written.
    """
    try:
        found = json.loads(text)
        return Owner(**found)
    except (ValueError, TypeError):
        return Owner(key=otherwise)


def identity_of(folder: Path) -> str:
    """Return what tells a folder from its copies on one host."""
    facts = folder.stat()
    return f"{facts.st_dev}:{facts.st_ino}"


def is_visible(owner: Owner, me: Owner) -> bool:
    """Tell whether an owner's process is one that this host knows by its number."""
    return bool(owner.process) and (owner.host, owner.machine) == (me.host, me.machine)


def lives(owner: Owner) -> bool:
    """Tell whether the process of an owner that `is_visible` still runs."""
    try:
        os.kill(owner.process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    return _start_of(owner.process) in (owner.started, None)


def is_requeued(owner: Owner, me: Owner) -> bool:
    """Tell whether this is an owner's own job, which Slurm has put back into the queue since."""
    return bool(me.job) and me.job == owner.job and me.restarts > owner.restarts


def _start_of(process: int) -> int | None:
    """Return when a process started, in clock ticks since the boot.

    -1 if it has ended and its parent has not noticed; None where this user may not look.
    """
    with suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        # The name, in parentheses, may hold anything.
        state, *fields = text.rpartition(")")[2].split()
        return -1 if state in "ZX" else int(fields[18])
    return None


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _namespace() -> str:
    """Return the namespace of process numbers: a container may have one of its own."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""
