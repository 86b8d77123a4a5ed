"""A real SLURM controller with several nodes on this machine, for tests. Root only; gone without a trace after `stop`.

Each node has a network, host-name, mount and process namespace of its own, so two nodes talk over a wire (a bridge) and
killing a node's first process is a power cut. Nothing outside the cluster's folder is written: own munge key and
socket, own configuration; `/etc/hosts` is mounted over inside the namespaces only.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
PROGRAMS = ("slurmctld", "slurmd", "munged", "ip", "unshare", "nsenter")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmctldPort={port}
SlurmdPort={node_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=6
KillWait=5
OverTimeLimit=0
MinJobAge=3600
MessageTimeout=5
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs=64 Boards=1 SocketsPerBoard=2 CoresPerSocket=32 RealMemory=500000 Gres=gpu:test:8
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def wait_until(holds: Callable[[], bool], seconds: float, what: Callable[[], str] = lambda: "it did not come") -> None:
    """Polls a condition; fails the test with `what()` if it does not hold in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds:.0f} s: {what()}"
        time.sleep(0.1)


class Cluster:
    """`with Cluster(2) as cluster:` – a controller and its nodes n1, n2, …, all idle."""

    def __init__(self, nodes: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.cleanup = ExitStack()
        self.nodes = [f"n{index + 1}" for index in range(nodes)]
        number = os.getpid() % 200
        self.name = f"ccd{number}"
        self.network = f"10.{number + 20}.77"
        self.ports = (20000 + number, 20200 + number)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environment = outside | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    @staticmethod
    def missing() -> str:
        """Why there can be no cluster here; empty if there can."""
        absent = [program for program in PROGRAMS if shutil.which(program) is None]
        if sys.platform != "linux" or os.geteuid() != 0:
            return "a cluster of namespaces needs root on Linux"
        return f"not installed: {', '.join(absent)}" if absent else ""

    def __enter__(self) -> Cluster:
        with self.cleanup as cleanup:  # undone at once if a part does not start
            cleanup.callback(shutil.rmtree, self.folder)
            self.folder.chmod(0o755)  # munge wants its socket reachable
            for part in ("log", "state", "spool", "munge", "dev"):
                (self.folder / part).mkdir()
            self._write_configuration()
            self._lay_network()
            cleanup.callback(self._stop)
            self._start_munge()
            self._start("slurmctld", ["slurmctld", "-D", "-c", "-f", str(self.folder / "slurm.conf")])
            for node in self.nodes:
                self.power_on(node)
            self.wait_for_nodes()
            self.cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.cleanup.close()

    def power_on(self, node: str) -> None:
        """Starts the node's first process, slurmd, in namespaces of its own."""
        inside = 'mount --bind "$1/hosts" /etc/hosts; hostname "$2"; slurmd -D -N "$2" -f "$1/slurm.conf"; exit'
        spaces = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        network = ["nsenter", f"--net=/run/netns/{self.name}{node}"]
        self._start(node, [*network, *spaces, "bash", "-c", inside, "_", str(self.folder), node])

    def power_off(self, node: str) -> None:
        """Every process of the node is gone at once; the controller finds out by itself."""
        process = self.processes.pop(node)
        process.kill()
        process.wait()

    def wait_for_nodes(self, seconds: float = 60) -> None:
        """Waits until all nodes are idle."""
        idle = ("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N")
        wait_until(lambda: set(self.run(*idle).split()) == set(self.nodes), seconds, lambda: self.run("sinfo", "-R"))

    def run(self, *command: str, cwd: Path = CHECKOUT) -> str:
        """Runs a command beside the controller, as on a login node; returns its stdout."""
        result = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, f"{command} ended with {result.returncode}: {result.stderr}"
        return result.stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job: `JobState`, `Restarts`, `ExitCode`, …"""
        text = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait_for(self, number: str, states: set[str], seconds: float = 120) -> dict[str, str]:
        """Waits until the job is in one of the states."""
        wait_until(lambda: self.job(number)["JobState"] in states, seconds, lambda: f"job {number}: {self.job(number)}")
        return self.job(number)

    def _stop(self) -> None:
        for process in reversed(list(self.processes.values())):
            process.kill()
            process.wait()

    def _start(self, name: str, command: list[str]) -> None:
        log = (self.folder / "log" / f"{name}.out").open("ab")
        self.processes[name] = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, start_new_session=True
        )
        log.close()

    def _write_configuration(self) -> None:
        addresses = {node: f"{self.network}.{10 + index}" for index, node in enumerate(self.nodes)}
        host = socket.gethostname().partition(".")[0]
        hosts = {"localhost": "127.0.0.1", host: f"{self.network}.1"} | addresses
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        nodes = "\n".join(f"NodeName={node} NodeHostname={node} NodeAddr={addresses[node]}" for node in self.nodes)
        text = CONFIGURATION.format(
            host=host,
            network=self.network,
            folder=self.folder,
            port=self.ports[0],
            node_port=self.ports[1],
            nodes=nodes,
        )
        (self.folder / "slurm.conf").write_text(text)
        for number in range(8):  # devices that can be opened: copies of /dev/null
            os.mknod(self.folder / "dev" / f"gpu{number}", 0o20666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu Type=test File={self.folder}/dev/gpu[0-7]\n")

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        munge.chmod(0o755)
        key = munge / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = {"key-file": key, "socket": munge / "socket", "pid-file": munge / "pid", "seed-file": munge / "seed"}
        self._start("munged", ["munged", "--foreground", *(f"--{name}={path}" for name, path in files.items())])
        wait_until((munge / "socket").exists, 10)

    def _lay_network(self) -> None:
        """A bridge, and for each node a network namespace with one wire to it."""
        bridge = f"{self.name}br"
        self._ip(f"link add {bridge} type bridge", undo=f"link del {bridge}")
        self._ip(f"addr add {self.network}.1/24 dev {bridge}")
        self._ip(f"link set {bridge} up")
        for index, node in enumerate(self.nodes):
            space, wire = f"{self.name}{node}", f"{self.name}v{index}"
            self._ip(f"netns add {space}", undo=f"netns del {space}")
            self._ip(f"link add {wire} type veth peer name eth0 netns {space}")
            self._ip(f"link set {wire} master {bridge} up")
            self._ip(f"-n {space} addr add {self.network}.{10 + index}/24 dev eth0")
            self._ip(f"-n {space} link set eth0 up")
            self._ip(f"-n {space} link set lo up")

    def _ip(self, command: str, undo: str = "") -> None:
        subprocess.run(["ip", *command.split()], check=True)
        if undo:
            self.cleanup.callback(subprocess.run, ["ip", *undo.split()], check=True)
