"""A Slurm cluster of two nodes on this host, for tests: real daemons, on ports and in a folder of their own.

Two slurmd stand for two nodes. Each has its own name, port, spool and temporary folder, and its own host name in a UTS
namespace: else Open MPI would take them for one host, and share memory between them.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from launch import BIN, hydra

T = TypeVar("T")

ROOT = Path(__file__).parents[1]
NODES = ("swap-n1", "swap-n2")
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge libpmix-dev"  # the last one for srun --mpi=pmix
MPI_TYPE = "pmi2" if hydra() else "pmix"  # of srun, for this environment's MPI
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
)

# Nodes as the batch scripts expect them, with 64 CPUs and 8 GPUs: Slurm hands out what it is told, and a "GPU" is a device file.
CONFIGURATION = """
ClusterName=swap_test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
GresTypes=gpu
ReturnToService=2
JobRequeue=1
KillWait=10
SlurmdTimeout=10
SlurmctldTimeout=30
InactiveLimit=0
MinJobAge=3600
"""
NODE = "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=16000 Gres=gpu:8 State=UNKNOWN\n"


@dataclass
class Cluster:
    folder: Path
    control_port: int = 0
    ports: dict[str, int] = field(default_factory=dict)
    daemons: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """Of a user's shell on the cluster's login node."""
        keep = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("SLURM_", "SBATCH_", "SWAP_", "OMPI_", "PMIX_", "PRTE_", "PMI_"))
        }
        ours = {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{BIN}:{keep['PATH']}:/usr/sbin",
            "VIRTUAL_ENV": str(BIN.parent),
            "SWAP_MPI": MPI_TYPE,
        }
        # all ranks of both nodes share this host's cores: one that waits must let others work
        crowded = {"OMPI_MCA_mpi_yield_when_idle": "1", "OMP_NUM_THREADS": "1"}
        return (
            keep
            | ours
            | crowded
            | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        )

    def start(self) -> None:
        self.control_port, *ports = _free_ports(1 + len(NODES))
        self.ports = dict(zip(NODES, ports, strict=True))
        (self.folder / "state").mkdir(parents=True)
        configuration = CONFIGURATION.format(
            host=socket.gethostname(), port=self.control_port, folder=self.folder
        )
        configuration += "".join(
            NODE.format(name=name, port=port) for name, port in self.ports.items()
        )
        configuration += (
            f"PartitionName=test Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP\n"
        )
        (self.folder / "slurm.conf").write_text(configuration)
        (self.folder / "gres.conf").write_text(
            "Name=gpu File=/dev/tty[0-7]\n" if Path("/dev/tty7").exists() else "Name=gpu Count=8\n"
        )
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        munge = {name: self.folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
        line = [
            "munged",
            "--foreground",
            "--force",
            "--num-threads=2",
            f"--key-file={self.folder / 'munge.key'}",
        ]
        line += [f"--{option}={munge[name]}" for option, name in
                 (("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))]  # fmt: skip
        self._begin("munged", line)
        wait_for(munge["socket"].exists, "munge's socket", 20)
        self._begin("slurmctld", ["slurmctld", "-D", "-c"])
        for node in NODES:
            self.start_node(node)
        wait_for(
            lambda: self.node_states() == dict.fromkeys(NODES, "idle"),
            f"two idle nodes (logs in {self.folder})",
            60,
        )

    def start_node(self, node: str) -> None:
        """Boots it: its spool is empty, as on a node that has it in memory. (Killed steps left PMIx sockets there.)"""
        for name in (f"spool-{node}", f"tmp-{node}"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir()
        inside = f'hostname "{node}" && exec slurmd -D -N "{node}"'
        self._begin(node, ["unshare", "--uts", "sh", "-c", inside])

    def kill_node(self, node: str) -> None:
        """The power fails: its slurmd and everything that runs on it dies at once."""
        for pid in _processes_of(self.daemons[node]):
            _kill(pid)
        self.daemons[node].wait()

    def _begin(self, name: str, line: list[str]) -> None:
        with open(self.folder / f"{name}.out", "ab") as output:
            self.daemons[name] = subprocess.Popen(
                line,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def stop(self) -> None:
        """Ends all jobs and daemons; nothing is left but the folder."""
        jobs = [
            pid
            for node in NODES
            if node in self.daemons
            for pid in _processes_of(self.daemons[node])
        ]
        subprocess.run(
            ["scancel", "--signal=KILL", "--full", "--user=root"],
            env=self.environment,
            capture_output=True,
            check=False,
        )
        for name in reversed(self.daemons):
            self.daemons[name].terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for pid in jobs:
            _kill(pid)

    # --- a user's commands ----------------------------------------------------------------------------------------------
    def run(
        self,
        *line: str | Path,
        variables: Mapping[str, str] = MappingProxyType({}),
        cwd: Path | None = None,
    ) -> str:
        """A command's output. Fails where it fails."""
        done = subprocess.run(
            list(map(str, line)),
            env=self.environment | dict(variables),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        return done.stdout

    def node_states(self) -> dict[str, str]:
        done = subprocess.run(
            ["sinfo", "-hNo", "%N %T"],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return dict(line.split() for line in done.stdout.splitlines())

    def jobs(self, job: int) -> list[dict[str, str]]:
        """A job's state as `scontrol` tells it; of an array, each task's."""
        lines = self.run("scontrol", "show", "--oneliner", "job", str(job)).splitlines()
        return [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in lines]

    def wait(self, job: int, seconds: float) -> list[dict[str, str]]:
        """The job's end, or its array's; whatever it was."""

        def ended() -> list[dict[str, str]]:
            found = self.jobs(job)
            return found if all(each["JobState"] in ENDED for each in found) else []

        return wait_for(ended, f"end of job {job}", seconds)


def wait_for(ready: Callable[[], T], what: str, seconds: float, every: float = 0.2) -> T:
    deadline = time.monotonic() + seconds
    while not (value := ready()):
        assert time.monotonic() < deadline, f"no {what} within {seconds:g} s"
        time.sleep(every)
    return value


def missing() -> str | None:
    """Why no cluster can be started here, with the command that mends it."""
    lacking = [
        program
        for program in NEEDED
        if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    ]
    if lacking:
        return f"no {', '.join(lacking)}: {INSTALL}"
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True, check=False).returncode:
        return "two slurmd on one host need host names of their own (unshare --uts), and that needs root"
    return None


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _processes_of(daemon: "subprocess.Popen[bytes]") -> list[int]:
    """All that runs on a daemon's node, which is a UTS namespace; nothing where that is still this host's own."""
    own, node = _namespace("self"), _namespace(str(daemon.pid))
    if node in (None, own):
        return []
    return [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _namespace(entry.name) == node
    ]


def _namespace(process: str) -> str | None:
    """None for a process that has ended."""
    try:
        return os.readlink(f"/proc/{process}/ns/uts")
    except OSError:
        return None


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
