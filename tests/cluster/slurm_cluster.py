"""A real, disposable Slurm on loopback: controller, emulated nodes with fake GPUs, accounting if wanted.

It needs root and Debian's packages, which it installs. All of it lives in one folder below /run and one link,
/etc/slurm/slurm.conf: the executor plugin takes SLURM_CONF out of the environment of a job's step, so that
only the built-in path is read there. Nothing is left behind by `stop`; what a killed test run left is removed
by the next one.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

LINK = Path("/etc/slurm/slurm.conf")
ROOTS = Path("/run")
PREFIX = "cryodrgn-pipeline-slurm-"
POLICY = Path("/usr/sbin/policy-rc.d")  # Debian asks it before it starts a package's daemon
PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
ACCOUNTING_PROGRAMS = {
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
    "mariadb": "mariadb-client-core",
}
DEVICES = ("/dev/null", "/dev/zero")  # one per fake GPU: anything that exists and can be opened
ACTIVE = frozenset({"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING"})
Job = dict[str, str]


def why_not() -> str | None:
    """Why no cluster can be started on this machine; None where it can."""
    if os.geteuid() != 0:
        return "a Slurm of our own needs root"
    if LINK.exists() and not _is_ours(LINK):
        return f"this machine has a Slurm of its own ({LINK})"
    missing = _missing(PROGRAMS)
    if missing and shutil.which("apt-get") is None:
        return f"not installed, and no apt-get to install it: {', '.join(missing)}"
    return None


def install(*, accounting: bool = False) -> None:
    """Install the Debian packages that are missing, without starting their daemons.

    Raises
    ------
    RuntimeError
        They cannot be installed.
    """
    wanted = PROGRAMS | (ACCOUNTING_PROGRAMS if accounting else {})
    packages = sorted({wanted[program] for program in _missing(wanted)})
    if not packages:
        return
    with ExitStack() as stack:
        if not POLICY.exists():
            POLICY.write_text("#!/bin/sh\nexit 101\n", encoding="utf-8")
            stack.callback(POLICY.unlink)
            POLICY.chmod(0o755)
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            command = ["apt-get", "-qq", *words]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


def _missing(programs: dict[str, str]) -> list[str]:
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return [program for program in programs if shutil.which(program, path=places) is None]


def _is_ours(link: Path) -> bool:
    return link.is_symlink() and link.readlink().parents[1].name.startswith(PREFIX)


def until(condition: Callable[[], Any], what: str, limit_s: float = 120.0) -> Any:
    """Wait for a condition and return what it gave; a failure that says `what` was waited for."""
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {limit_s:.0f} s")
        time.sleep(0.2)
    return found


def kill_tree(pid: int) -> None:
    """Kill −9 a process and all below it."""
    with suppress(psutil.NoSuchProcess):
        head = psutil.Process(pid)
        for process in [head, *head.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


class SlurmCluster:
    """One Slurm: `with SlurmCluster(nodes=2) as cluster`.

    Parameters
    ----------
    nodes
        Emulated nodes n1, n2, …, each a slurmd of its own.
    gpus
        Fake GPUs per node, at most two; jobs see their numbers in CUDA_VISIBLE_DEVICES.
    cpus
        What each node claims to have, whatever the machine has.
    accounting
        Start MariaDB and slurmdbd too, so that sacct answers; the user is in account `lab`.
    preemption
        Jobs of partition `high` push those of `gpu` and `cpu` back into the queue.
    patience_s
        How long to wait for another test run's cluster to go: a machine has one at a time.
    """

    def __init__(
        self,
        *,
        nodes: int = 1,
        gpus: int = 1,
        cpus: int = 4,
        accounting: bool = False,
        preemption: bool = False,
        patience_s: float = 1200,
    ) -> None:
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.gpus, self.cpus = gpus, cpus
        self.accounting, self.preemption = accounting, preemption
        self.patience_s = patience_s
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ── What tests ask and do ──

    def jobs_by_id(self) -> dict[str, Job]:
        """Jobs that Slurm still knows, oldest first, as `scontrol show job` has them."""
        shown = self.client("scontrol", "-o", "show", "jobs")
        parsed = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in shown.splitlines()]
        found = [job for job in parsed if "JobId" in job]
        return {job["JobId"]: job for job in sorted(found, key=lambda job: int(job["JobId"]))}

    def jobs(self, rule: str = "") -> list[Job]:
        """The workflow's jobs, oldest first; those of one rule."""
        jobs = self.jobs_by_id().values()
        return [job for job in jobs if job.get("Comment", "").startswith(f"rule_{rule}")]

    def active(self, rule: str = "") -> list[Job]:
        """Jobs that wait or run."""
        return [job for job in self.jobs(rule) if job["JobState"] in ACTIVE]

    def finished(self) -> list[Job]:
        """The log of ended jobs: every end of every job, requeued ones included."""
        path = self.root / "log" / "jobcomp.txt"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines]

    def client(self, *words: str) -> str:
        """Run one of Slurm's commands; returns what it prints."""
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def lose_node(self, node: str) -> None:
        """What a power cut does: the node's slurmd and all that runs on it are gone at once."""
        daemon = self._daemons.pop(f"slurmd-{node}")
        daemon.kill()
        daemon.wait()
        lost = {job["JobId"] for job in self.active() if job.get("NodeList") == node}
        for process in psutil.process_iter(["pid", "cmdline"]):
            title = " ".join(process.info["cmdline"] or ())
            step = re.match(r"slurmstepd: \[(\d+)\.", title)
            if step and step[1] in lost:
                kill_tree(process.info["pid"])

    def bring_back(self, node: str) -> None:
        """Start a lost node's slurmd again."""
        self._slurmd(node)
        until(lambda: self._idle() == len(self.nodes), f"node {node} back")

    def tidy(self) -> None:
        """Cancel all jobs and wait until none is left, so that the next test finds an empty queue."""
        self.client("scancel", "--state=PENDING", f"--user={os.getuid()}")
        self.client("scancel", "--state=RUNNING", f"--user={os.getuid()}")
        until(lambda: not self.client("squeue", "-h", "-t", "PD,R,CG,CF,S").strip(), "an empty queue")

    # ── Start and stop ──

    def _start(self) -> None:
        self._stack.enter_context(_only_one(self.patience_s))
        _remove_leftovers()
        self.root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=ROOTS))
        self._stack.callback(shutil.rmtree, self.root, ignore_errors=True)
        for name in ("etc", "run", "log", "state", "spool"):
            (self.root / name).mkdir()
        self.root.chmod(0o755)
        self._write_configuration()
        self._stack.enter_context(_linked(self.root / "etc" / "slurm.conf"))
        key = self.root / "etc" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        run, log = self.root / "run", self.root / "log"
        self._daemon(
            "munged",
            *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={run}/munge.sock"),
            *(f"--pid-file={run}/munge.pid", f"--log-file={log}/munged.log"),
            *(f"--seed-file={run}/munge.seed", "--num-threads=2"),
        )
        until((run / "munge.sock").exists, "munged's socket")
        if self.accounting:
            self._start_accounting()
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in self.nodes:
            self._slurmd(node)
        try:
            until(lambda: self._idle() == len(self.nodes), "nodes up", 60)
        except TimeoutError as error:
            raise RuntimeError(f"{error}\n{self.logs()}") from error

    def _slurmd(self, node: str) -> None:
        (self.root / "spool" / node).mkdir(exist_ok=True)
        self._daemon(f"slurmd-{node}", "slurmd", "-D", "-N", node)

    def _start_accounting(self) -> None:
        run, log, database = (self.root / name for name in ("run", "log", "db"))
        database.mkdir()
        common = ["--no-defaults", f"--datadir={database}", "--user=root"]
        made = [*common, "--auth-root-authentication-method=normal", "--skip-test-db"]
        self.client("mariadb-install-db", *made)
        self._daemon(
            "mariadbd",
            *("mariadbd", *common, f"--socket={run}/mariadb.sock", "--skip-networking"),
            *(f"--pid-file={run}/mariadb.pid", "--innodb-buffer-pool-size=64M"),
            *("--innodb-lock-wait-timeout=900", f"--log-error={log}/mariadb.log"),
        )
        until((run / "mariadb.sock").exists, "MariaDB's socket")
        self._daemon("slurmdbd", "slurmdbd", "-D")
        until(lambda: self._quietly("sacctmgr", "-n", "-i", "show", "cluster"), "slurmdbd")
        for words in (
            ["cluster", "test"],
            ["account", "lab", "Cluster=test"],
            ["user", "root", "Account=lab", "DefaultAccount=lab"],
        ):
            self.client("sacctmgr", "-i", "-Q", "add", *words)

    def stop(self) -> None:
        """End all jobs and daemons, and remove everything."""
        if "slurmctld" in self._daemons:
            with suppress(RuntimeError, TimeoutError):
                self.tidy()
        for daemon in reversed(list(self._daemons.values())):
            _end(daemon.pid)
            daemon.wait()
        self._daemons.clear()
        self._stack.close()

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        found = sorted((self.root / "log").glob("*.log"))
        return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-1500:]}" for path in found)

    def _idle(self) -> int:
        shown = self._quietly("sinfo", "-h", "-N", "-p", "cpu", "-o", "%t") or ""
        return shown.split().count("idle")

    def _quietly(self, *words: str) -> str | None:
        try:
            return self.client(*words) or " "
        except RuntimeError:
            return None

    def _daemon(self, name: str, *command: str) -> None:
        environment = os.environ | {
            "SLURM_CONF": str(self.root / "etc" / "slurm.conf"),
            "MYSQL_UNIX_PORT": str(self.root / "run" / "mariadb.sock"),
            "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]),
        }
        out: IO[bytes]
        with (self.root / "log" / f"{name}.out.log").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the tests stops them in order, not all at once
            )
        (self.root / "run" / f"{name}.process").write_text(str(self._daemons[name].pid), encoding="utf-8")

    # ── Configuration ──

    def _write_configuration(self) -> None:
        host = socket.gethostname().partition(".")[0]
        etc, names = self.root / "etc", ",".join(self.nodes)
        text = SLURM_CONF.format(root=self.root, host=host, names=names)
        for number, node in enumerate(self.nodes):
            text += (
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={17101 + number}"
                f" CPUs={self.cpus} RealMemory=64000 Gres=gpu:fake:{self.gpus} State=UNKNOWN\n"
            )
        if self.preemption:
            text += "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\n"
        if self.accounting:
            text += ACCOUNTING_CONF.format(root=self.root)
            (etc / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(root=self.root, host=host), "utf-8")
            (etc / "slurmdbd.conf").chmod(0o600)
        (etc / "slurm.conf").write_text(text, encoding="utf-8")
        devices = "".join(f"Name=gpu Type=fake File={device}\n" for device in DEVICES[: self.gpus])
        (etc / "gres.conf").write_text(devices, encoding="utf-8")
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n", encoding="utf-8")  # read though unused


@contextmanager
def _only_one(patience_s: float) -> Iterator[None]:
    """Hold a name that the kernel gives to one process at a time and takes back at its end."""
    with socket.socket(socket.AF_UNIX) as lock:

        def taken() -> bool:
            try:
                lock.bind(f"\0{PREFIX}lock")
            except OSError:
                return False
            return True

        until(taken, "the end of another test run that has a Slurm up on this machine", patience_s)
        yield


@contextmanager
def _linked(configuration: Path) -> Iterator[None]:
    made = not LINK.parent.exists()
    LINK.parent.mkdir(parents=True, exist_ok=True)
    LINK.symlink_to(configuration)
    try:
        yield
    finally:
        LINK.unlink()
        if made:
            LINK.parent.rmdir()


def _remove_leftovers() -> None:
    """Remove what a killed test run left; its lock is free, so it is no longer there."""
    for root in ROOTS.glob(f"{PREFIX}*/"):
        for path in (root / "run").glob("*.process"):
            name, pid = path.stem.partition("-")[0], int(path.read_text(encoding="utf-8"))
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).name() == name:  # not a stranger that has the number now
                    _end(pid)
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if _belongs_to(root, process):
                    keeper = process.parent()
                    process.kill()
                    if keeper is not None and keeper.name() == "slurmstepd":
                        keeper.kill()
        shutil.rmtree(root, ignore_errors=True)
    if LINK.is_symlink() and _is_ours(LINK):
        LINK.unlink()


def _belongs_to(root: Path, process: psutil.Process) -> bool:
    """Whether it is a job's: Slurm tells it where the configuration is."""
    return Path(process.environ().get("SLURM_CONF", "/")).is_relative_to(root)


def _end(pid: int) -> None:
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        os.kill(pid, signal.SIGTERM)
        try:
            psutil.Process(pid).wait(timeout=15)
        except psutil.TimeoutExpired:
            os.kill(pid, signal.SIGKILL)


SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17002
SlurmUser=root
AuthType=auth/munge
# a requeued job waits as long as its credential is valid (seconds)
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdSpoolDir={root}/spool/%n
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmdLogFile={root}/log/slurmd-%n.log
# no cgroups, no pinning: works in containers and virtual machines
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# believe this file, not the hardware
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,requeue_setup_env_fail
ReturnToService=2
MpiDefault=none
# ended jobs stay visible to squeue this long (seconds)
MinJobAge=600
KillWait=15
SlurmdTimeout=20
JobRequeue=1
GresTypes=gpu
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobcomp.txt
PartitionName=cpu Nodes={names} Default=YES MaxTime=INFINITE State=UP DefMemPerCPU=100 PriorityTier=1
PartitionName=gpu Nodes={names} MaxTime=INFINITE State=UP DefMemPerCPU=100 PriorityTier=1
PartitionName=high Nodes={names} MaxTime=INFINITE State=UP DefMemPerCPU=100 PriorityTier=10
"""

ACCOUNTING_CONF = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=17003
AccountingStoragePass={root}/run/munge.sock
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment
"""

SLURMDBD_CONF = """\
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort=17003
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.sock
PidFile={root}/run/slurmdbd.pid
LogFile={root}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
"""
