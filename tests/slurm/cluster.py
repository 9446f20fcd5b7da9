"""A throwaway Slurm cluster on this machine, without systemd and without leaving anything behind.

As root every node has its own network, host name, processes and `/dev/shm`, so that a node can
crash or lose its network. Otherwise ("flat") all nodes are slurmd processes on 127.0.0.1. A daemon
is stopped by its process number and its start time, never by a name, and dies with this process.
"""

import ctypes
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

NODE_SCRIPT = Path(__file__).with_name("node.sh")
NAMES_SCRIPT = Path(__file__).with_name("names.sh")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def program(name):
    """Path of a program, in the folders of daemons too; None when it is not installed."""
    return shutil.which(name, path=PATH)


def missing_programs():
    return [name for name in PROGRAMS if program(name) is None]


def start_time(pid):
    """When a process started, in clock ticks since the boot; None when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _die_with_the_tests():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Daemon:
    """A process that this one started, in a session of its own."""

    def __init__(self, words, log, environment):
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=environment,
                preexec_fn=_die_with_the_tests,
            )
        self.pid = self.process.pid
        self.started = start_time(self.pid)

    @property
    def alive(self):
        return self.process.poll() is None and start_time(self.pid) == self.started

    def stop(self, number=signal.SIGTERM, patience=5.0):
        """End it; with SIGKILL when it does not listen."""
        for sent in (number, signal.SIGKILL):
            if self.alive:
                os.kill(self.pid, sent)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(patience)


class Cluster:
    """The cluster: `up` starts it, `down` ends it.

    Attributes:
        nodes: names of the nodes.
        netns: whether each node has a network of its own.
        environment: what its commands need.
    """

    def __init__(self, root, cpus=32, gpus=0):
        self.root = Path(root)
        self.netns = os.geteuid() == 0 and program("unshare") is not None and self._has_network()
        self.nodes = [f"n{number}" for number in range(1, 9)]
        self.cpus, self.gpus = cpus, gpus
        self.environment = {
            **{name: text for name, text in os.environ.items() if not name.startswith("SLURM")},
            "PATH": PATH,
            "SLURM_CONF": str(self.root / "etc/slurm.conf"),
            "SLURMD": program("slurmd") or "",
        }
        self.daemons = {}
        # A daemon dies with the thread that started it, so that is one that lives to the end.
        self._starter = ThreadPoolExecutor(1)
        self._bridge = f"xs{os.getpid()}"
        self._subnet = f"10.{77 + os.getpid() % 100}.{os.getpid() % 251}"

    @staticmethod
    def _has_network():
        """Whether links and namespaces may be made: a container's root often may not."""
        made = subprocess.run(
            ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"],
            capture_output=True,
            check=False,
        )
        return made.returncode == 0 and program("ip") is not None

    def up(self):
        for name in ("etc", "log", "state", "spool", "pids", "scratch", "dev"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        (self.root / "munge").mkdir(mode=0o711)
        with open(self.root / "munge/key", "xb", opener=lambda p, f: os.open(p, f, 0o600)) as key:
            key.write(os.urandom(128))
        munge = self.root / "munge"
        words = [program("munged"), "-F", f"--key-file={munge}/key", f"--socket={munge}/sock"]
        words += [f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"]
        self._start("munged", [*words, "--num-threads=2"])
        self._until(lambda: (munge / "sock").exists(), 60, "munged does not answer")
        if self.netns:
            self._make_bridge()
        self._ports = free_ports(len(self.nodes) + 1)
        (self.root / "etc/slurm.conf").write_text(self._configuration())
        self.start_controller()
        for name in self.nodes:
            self.start_node(name)
        try:
            self.wait_until_idle(120)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None
        return self

    def start_controller(self):
        words = [program("slurmctld"), "-D"]
        if self.netns:
            words = ["unshare", "--mount", *self._with_names(words)]
        self._start("slurmctld", words)

    def start_node(self, name):
        if not self.netns:
            self._start(name, [program("slurmd"), "-D", "-N", name])
            return
        number = self.nodes.index(name) + 1
        link = f"{self._bridge}v{number}"
        ip("link", "del", link, check=False)
        words = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork"]
        words += ["--mount-proc", "--kill-child=KILL"]
        script = ["/bin/bash", NODE_SCRIPT, self.root, name, f"{self._subnet}.{number}/24"]
        node = self._start(name, [*words, *self._with_names(script)])
        children = Path(f"/proc/{node.pid}/task/{node.pid}/children")
        self._until(lambda: children.read_text().strip(), 60, f"{name} does not start")
        init = children.read_text().split()[0]
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", init)
        ip("link", "set", link, "master", self._bridge, "up")

    def wait_until_idle(self, seconds):
        def idle():
            told = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).stdout.split("\n")
            found = {line.split()[0] for line in told if line.endswith((" idle", " mixed"))}
            return found == set(self.nodes)

        self._until(idle, seconds, "the nodes do not become idle")

    # Faults ---------------------------------------------------------------------------------

    def crash(self, name):
        """Power loss: everything on the node is gone at once."""
        self.daemons.pop(name).stop(signal.SIGKILL)

    def cut(self, name):
        """The node loses its network; its processes live on."""
        ip("link", "set", f"{self._bridge}v{self.nodes.index(name) + 1}", "down")

    def heal(self, name):
        ip("link", "set", f"{self._bridge}v{self.nodes.index(name) + 1}", "up")

    def kill_controller(self):
        self.daemons.pop("slurmctld").stop(signal.SIGKILL)

    def kill_slurmd(self, name):
        """The node's slurmd dies; its steps live on."""
        inside = (self.root / f"pids/{name}.slurmd").read_text().strip()
        children = Path(f"/proc/{self.daemons[name].pid}/task/{self.daemons[name].pid}/children")
        init = children.read_text().split()[0]
        subprocess.run(["nsenter", "-t", init, "-p", "-m", "kill", "-KILL", inside], check=True)

    def restart_slurmd(self, name):
        (self.root / f"pids/{name}.restart").touch()

    # Commands -------------------------------------------------------------------------------

    def run(self, *words, check=True, timeout=120, **keys):
        """Run one of Slurm's commands from the machine that submits."""
        words = [program(words[0]) or words[0], *map(str, words[1:])]
        keys.setdefault("env", self.environment)
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, **keys)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done

    def job(self, number):
        """What Slurm knows about a job, by key; empty when it has forgotten the job."""
        told = self.run("scontrol", "-o", "show", "job", number, check=False).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", told))

    def wait_for(self, condition, seconds, what):
        """Wait until `condition()` is true and return it; tells what did not happen otherwise."""
        return self._until(condition, seconds, what)

    def wait_for_end(self, *jobs, seconds=400):
        """Wait until jobs have left the queue for good; their final states by job."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        def states():
            found = {job: self.job(job).get("JobState", "GONE") for job in jobs}
            return found if all(state in (*ended, "GONE") for state in found.values()) else None

        return self._until(states, seconds, f"jobs {jobs} do not end")

    def down(self):
        """Cancel every job, so that no step outlives its slurmd, and stop the daemons."""
        if "slurmctld" in self.daemons:
            with suppress(subprocess.TimeoutExpired):
                queue = self.run("squeue", "-h", "-o", "%A", check=False, timeout=10).stdout.split()
                if queue:
                    self.run("scancel", "--full", "--signal=KILL", *queue, check=False)
                    self.run("scancel", *queue, check=False)
        for name in self.nodes:
            if name in self.daemons:
                self.daemons.pop(name).stop(signal.SIGKILL if self.netns else signal.SIGTERM)
        for name in ("slurmctld", "munged"):
            if name in self.daemons:
                self.daemons.pop(name).stop()
        self._starter.shutdown()
        if self.netns:
            ip("link", "del", self._bridge, check=False)

    # ----------------------------------------------------------------------------------------

    def _with_names(self, words):
        return ["/bin/bash", NAMES_SCRIPT, self.root, *words]

    def _start(self, name, words):
        log = self.root / "log" / f"{name}.out"
        started = self._starter.submit(Daemon, words, log, self.environment)
        self.daemons[name] = started.result()
        return self.daemons[name]

    def _until(self, condition, seconds, what):
        limit = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > limit:
                raise AssertionError(f"{what} within {seconds} s")
            time.sleep(0.2)
        return found

    def logs(self):
        """The last lines of each daemon's log."""
        texts = []
        for path in sorted((self.root / "log").iterdir()):
            lines = path.read_text(errors="replace").splitlines()[-12:]
            texts.append("\n".join([f"== {path.name}", *lines]))
        return "\n".join(texts)

    def _make_bridge(self):
        for name in re.findall(r"\b(xs\d+):", ip("link", "show").stdout):
            if not Path(f"/proc/{name[2:]}").exists():  # left by tests that were killed
                ip("link", "del", name, check=False)
        ip("link", "add", self._bridge, "type", "bridge")
        ip("addr", "add", f"{self._subnet}.254/24", "dev", self._bridge)
        ip("link", "set", self._bridge, "up")
        names = [f"{self._subnet}.{number} {name}" for number, name in enumerate(self.nodes, 1)]
        host = socket.gethostname().split(".")[0]
        lines = ["127.0.0.1 localhost", f"{self._subnet}.254 {host}", *names]
        etc = self.root / "etc"
        (etc / "hosts").write_text("\n".join(lines) + "\n")
        switch = Path("/etc/nsswitch.conf")
        text = switch.read_text() if switch.exists() else "hosts: files\n"
        (etc / "nsswitch.conf").write_text(re.sub(r"(?m)^hosts:.*", "hosts: files", text))
        (etc / "resolv.conf").write_text("options timeout:1 attempts:1\n")

    def _configuration(self):
        user = pwd.getpwuid(os.geteuid()).pw_name
        host = socket.gethostname().split(".")[0]
        memory = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) // 1024
        root, gres = self.root, ""
        lines = []
        if self.gpus:
            # A count alone is refused; any character device will do as a GPU.
            for number in range(self.gpus):
                with suppress(FileExistsError):
                    os.mknod(root / f"dev/gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))
            (root / "etc/gres.conf").write_text(
                f"Name=gpu File={root}/dev/gpu[0-{self.gpus - 1}]\n"
            )
            lines.append("GresTypes=gpu")
            gres = f" Gres=gpu:{self.gpus}"
        address = f"{self._subnet}.254" if self.netns else "127.0.0.1"
        for number, name in enumerate(self.nodes, 1):
            where = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={self._ports[number]}"
            if self.netns:
                where = f"NodeHostname={name} NodeAddr={self._subnet}.{number} Port=17001"
            size = f"CPUs={self.cpus} RealMemory={memory}"
            lines.append(f"NodeName={name} {where} {size} Weight={number}{gres}")
            (root / "spool" / name).mkdir(exist_ok=True)
        return CONFIGURATION.format(
            host=host, address=address, user=user, root=root, port=self._ports[0]
        ) + "\n".join(
            [
                *lines,
                *[
                    f"PartitionName={name} Nodes={nodes} MaxTime=INFINITE State=UP {rest}"
                    for name, nodes, rest in PARTITIONS
                ],
                "",
            ]
        )


# Faults of a node meet no job of another test: `crash` and `cut` have their own nodes, and so have
# the partitions that preempt.
PARTITIONS = (
    ("main", "n1,n2", "Default=YES PriorityTier=10 PreemptMode=OFF"),
    ("low", "n3", "PriorityTier=1 PreemptMode=REQUEUE GraceTime=10"),
    ("harsh", "n3", "PriorityTier=1 PreemptMode=REQUEUE"),
    ("high", "n3", "PriorityTier=100 PreemptMode=OFF"),
    ("crash", "n4,n5,n6", "PriorityTier=10 PreemptMode=OFF"),
    ("cut", "n7,n8", "PriorityTier=10 PreemptMode=OFF"),
    ("three", "n1,n2,n6", "PriorityTier=10 PreemptMode=OFF"),
    ("four", "n1,n2,n3,n6", "PriorityTier=10 PreemptMode=OFF"),
)
# cred_expire: a requeued job waits for its old credential to expire, 120 s by default; 5 is the
# least that is accepted. SlurmdTimeout: 300 s by default until a lost node is noticed.
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge/sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobcomp.log
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=1,sched_min_interval=50000,batch_sched_delay=0,requeue_delay=1,preempt_youngest_first
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
MinJobAge=600
KillWait=5
UnkillableStepTimeout=20
MessageTimeout=10
CompleteWait=0
JobRequeue=1
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PropagateResourceLimits=NONE
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/pids/slurmctld
SlurmdPidFile={root}/pids/%n
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%n.log
SlurmctldDebug=info
SlurmdDebug=info
"""


def ip(*words, check=True):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


def free_ports(count):
    """Ports on which nobody listens, all different."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
