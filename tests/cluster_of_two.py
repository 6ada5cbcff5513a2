"""A Slurm cluster of two nodes on this host: real daemons with their own ports and folder.

Two slurmd act as two nodes. Each has its own name, port, spool and temporary folder, and a host
name in its own UTS namespace. With one host name, Open MPI would take them for one host and share
memory between them.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from launch import BIN, HANG, hydra, wait_for

ROOT = Path(__file__).parents[1]
NODES = ("swap-n1", "swap-n2")
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
# libpmix-dev is for srun --mpi=pmix.
INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge libpmix-dev"
MPI_TYPE = "pmi2" if hydra() else "pmix"  # srun's option for this environment's MPI
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

# Nodes as the batch scripts expect them, with 64 CPUs and 8 GPUs. Slurm does not check that they
# exist, and a "GPU" is a device file.
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
SlurmdSpoolDir={spool}/%n
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
FirstJobId={first_job}
"""
NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} "
    "CPUs=64 RealMemory=16000 Gres=gpu:8 State=UNKNOWN\n"
)
PARTITION = "PartitionName=test Nodes={nodes} Default=YES MaxTime=INFINITE State=UP\n"
# Variables of the shell that started the tests which would change a job.
FOREIGN = ("SLURM_", "SBATCH_", "SWAP_", "OMPI_", "PMIX_", "PRTE_", "PMI_")


@dataclass
class Cluster:
    """The daemons of a cluster whose files lie in `folder`."""

    folder: Path
    # Slurm makes sockets in it, whose paths may have no more than 107 characters.
    spool: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="slurmd-")))
    control_port: int = 0
    ports: dict[str, int] = field(default_factory=dict)
    daemons: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a user's shell on the login node."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        return kept | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{BIN}:{kept['PATH']}:/usr/sbin",
            "VIRTUAL_ENV": str(BIN.parent),
            "SWAP_MPI": MPI_TYPE,
            # All ranks of both nodes share this host's cores: one that waits must let others work.
            "OMPI_MCA_mpi_yield_when_idle": "1",
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }

    def start(self) -> None:
        """Start all daemons, and wait until both nodes are idle."""
        # Otherwise Slurm would requeue every job without an end.
        assert len(str(self.spool)) <= 60, f"{self.spool}: TMPDIR is too long for Slurm's sockets"
        self.control_port, *ports = _free_ports(1 + len(NODES))
        self.ports = dict(zip(NODES, ports, strict=True))
        (self.folder / "state").mkdir(parents=True)
        self._configure()
        self._start_munge()
        self._begin("slurmctld", ["slurmctld", "-D", "-c"])
        for node in NODES:
            self.start_node(node)
        idle = dict.fromkeys(NODES, "idle")
        what = f"two idle nodes (logs in {self.folder})"
        wait_for(lambda: self.node_states() == idle, what)

    def _configure(self) -> None:
        """Write Slurm's configuration."""
        host = socket.gethostname()
        # Open MPI names its shared memory after the node and the job: clusters that run at the same
        # time need other numbers.
        configuration = CONFIGURATION.format(
            host=host,
            port=self.control_port,
            folder=self.folder,
            spool=self.spool,
            first_job=1 + 1000 * (os.getpid() % 60000),
        )
        for name, port in self.ports.items():
            configuration += NODE.format(name=name, port=port)
        configuration += PARTITION.format(nodes=",".join(NODES))
        (self.folder / "slurm.conf").write_text(configuration)
        have_files = Path("/dev/tty7").exists()
        gpus = "Name=gpu File=/dev/tty[0-7]\n" if have_files else "Name=gpu Count=8\n"
        (self.folder / "gres.conf").write_text(gpus)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        socket_file = self.folder / "munge.socket"
        line = ["munged", "--foreground", "--force", "--num-threads=2"]
        line += [f"--key-file={key}", f"--socket={socket_file}"]
        for name in ("pid", "log", "seed"):
            line.append(f"--{name}-file={self.folder}/munge.{name}")
        self._begin("munged", line)
        wait_for(socket_file.exists, "munge's socket")

    def start_node(self, node: str) -> None:
        """Boot a node, with an empty spool: killed steps leave PMIx's sockets there."""
        for path in (self.spool / node, self.folder / f"tmp-{node}"):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        inside = f'hostname "{node}" && exec slurmd -D -N "{node}"'
        self._begin(node, ["unshare", "--uts", "sh", "-c", inside])

    def kill_node(self, node: str) -> None:
        """End a node's slurmd and everything that runs on it at once, like a power failure."""
        for pid in _processes_of(self.daemons[node]):
            _kill(pid)
        self.daemons[node].wait()

    def _begin(self, name: str, line: list[str]) -> None:
        """Start a daemon whose output goes to a file."""
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
        """End all jobs and daemons. Only `folder` stays."""
        started = [node for node in NODES if node in self.daemons]
        jobs = [pid for node in started for pid in _processes_of(self.daemons[node])]
        self._call("scancel", "--signal=KILL", "--full", "--user=root")
        for name in reversed(self.daemons):
            self.daemons[name].terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for pid in jobs:
            _kill(pid)
        shutil.rmtree(self.spool, ignore_errors=True)

    # A user's commands

    def run(
        self,
        *line: str | Path,
        variables: Mapping[str, str] = MappingProxyType({}),
        cwd: Path | None = None,
    ) -> str:
        """Run a command, and return its output. Raises AssertionError if it fails."""
        done = subprocess.run(
            list(map(str, line)),
            env=self.environment | dict(variables),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=HANG,
            check=False,
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        return done.stdout

    def node_states(self) -> dict[str, str]:
        """Return the state of each node that slurmctld knows."""
        output = self._call("sinfo", "-hNo", "%N %T")
        return dict(line.split() for line in output.splitlines())

    def _call(self, *line: str) -> str:
        """Run a command, and return its output even if it fails."""
        done = subprocess.run(
            line, env=self.environment, capture_output=True, text=True, check=False
        )
        return done.stdout

    def jobs(self, job: int) -> list[dict[str, str]]:
        """Return a job's state as `scontrol` shows it; for an array, the state of each task."""
        lines = self.run("scontrol", "show", "--oneliner", "job", str(job)).splitlines()
        return [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in lines]

    def wait(self, job: int) -> list[dict[str, str]]:
        """Wait until a job, or each task of its array, has ended; return the states."""

        def ended() -> list[dict[str, str]]:
            found = self.jobs(job)
            return found if all(each["JobState"] in ENDED for each in found) else []

        return wait_for(ended, f"end of job {job}")


def missing() -> str | None:
    """Return why no cluster can be started here, with the command that helps; None if one can."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    lacking = [program for program in NEEDED if not shutil.which(program, path=path)]
    if lacking:
        return f"no {', '.join(lacking)}: {INSTALL}"
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True, check=False).returncode:
        return "two slurmd on one host need their own host names (unshare --uts), which needs root"
    return None


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Start a cluster in a folder, and stop it at the end."""
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
    """Return the processes on a daemon's node, which is a UTS namespace.

    A node that has not come up yet still is in this host's namespace, and has no processes.
    """
    own, node = _namespace("self"), _namespace(str(daemon.pid))
    if node in (None, own):
        return []
    processes = [entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [int(process) for process in processes if _namespace(process) == node]


def _namespace(process: str) -> str | None:
    """Return the UTS namespace of a process; None for one that has ended."""
    try:
        return os.readlink(f"/proc/{process}/ns/uts")
    except OSError:
        return None


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
