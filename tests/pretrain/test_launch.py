"""Local workers: exit codes, output, signals as a terminal and as `kill` send them.

The workers are small scripts without torch, so that each case takes about a second.
"""

import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.commands.run import launch
from pretrain.commands.run.launch import run_workers
from pretrain.config import ConfigError, config_from_dict
from pretrain.processes import devices, workers
from pretrain.processes.workers import worker_environment
from pretrain.supervision.lease import Lease
from xlstm_io.signals import REPEAT_WINDOW_S, STOPPING

SHIPPED_GRACE_S = workers.FAILURE_GRACE_S

PRELUDE = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
from pathlib import Path
"""

# A worker as the trainer is one: it takes a while to save, then says so and exits with 75.
TRAINER = """
from xlstm_io.signals import StopSignal
with StopSignal(announce=rank == 0) as stop:
    print("ready", flush=True)
    Path(sys.argv[1], f"ready{rank}").touch()
    limit = time.monotonic() + 300  # a failing test leaves nothing behind for long
    while not stop.requested and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(float(sys.argv[2]))
    Path(sys.argv[1], f"saved{rank}").touch()
sys.exit(75)
"""

LAUNCHER = """
import sys
from pathlib import Path
from pretrain.commands.run.launch import run_workers
command, folder = sys.argv[1:-1], Path(sys.argv[-1])
code = run_workers([sys.executable, *command], 2, folder / "logs")
print("launcher returns", code, flush=True)
sys.exit(code)
"""


def script(folder: Path, body: str) -> Path:
    path = folder / "worker.py"
    path.write_text(PRELUDE + body)
    return path


def run(folder: Path, body: str, nproc: int = 2) -> int:
    return run_workers([sys.executable, str(script(folder, body))], nproc, folder / "logs")


def launcher(folder: Path, saving: float) -> list[str]:
    """Command line of a process that launches two trainers."""
    worker = script(folder, TRAINER)
    words = [sys.executable, "-c", LAUNCHER, str(worker), str(folder), str(saving), str(folder)]
    return words


@pytest.fixture(autouse=True)
def others_are_waited_for(monkeypatch):
    """A worker that is to end by itself is given the time, however busy the machine."""
    monkeypatch.setattr(workers, "FAILURE_GRACE_S", 120.0)


def wait_for(*paths: Path, seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < limit, f"{paths} did not appear"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("pass", 0),
        ("sys.exit(75)", 75),
        ("sys.exit(75 if rank else 0)", 75),
        ("sys.exit(2)", 2),
        ("raise RuntimeError('a bug')", 1),
        ("sys.exit(9)", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", 70),
        ("os.kill(os.getpid(), signal.SIGTERM)", 70),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 1),
        ("sys.exit(70)", 70),
        ("sys.exit(1 if rank else 75)", 1),
    ],
)
def test_exit_codes(tmp_path, body, code):
    assert run(tmp_path, body) == code


def test_refused_input_outranks_the_error_it_causes_elsewhere(tmp_path):
    assert (
        run(tmp_path, "time.sleep(0 if rank == 0 else 0.3); sys.exit(1 if rank == 0 else 2)") == 2
    )


@pytest.mark.parametrize("late", [70, 1])
def test_a_kill_outranks_the_errors_it_causes_elsewhere(tmp_path, capfd, late):
    body = f"os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(0.3); sys.exit({late})"
    assert run(tmp_path, body) == 70
    assert "rank 1 was killed by SIGKILL" in capfd.readouterr().err


def test_a_bug_outranks_the_lost_connection_it_causes_elsewhere(tmp_path, capfd):
    assert run(tmp_path, "sys.exit(70) if rank else time.sleep(0.3); sys.exit(1)") == 1


def test_only_rank_0_prints(tmp_path, capfd):
    assert run(tmp_path, "print('hello from', rank, flush=True)", nproc=3) == 0
    out, err = capfd.readouterr()
    assert out == "hello from 0\n"
    assert err == ""
    assert (tmp_path / "logs" / "rank_2.log").read_text() == "hello from 2\n"


def test_an_error_of_another_rank_is_shown_once(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(workers, "FAILURE_GRACE_S", 0.3)
    body = "sys.exit(print('error: shard 7 is damaged', file=sys.stderr) or 2) if rank else None\n"
    assert run(tmp_path, body + "time.sleep(600)") == 2
    text = "".join(capfd.readouterr())
    assert text.count("error: shard 7 is damaged") == 1
    assert "rank 1 ended with exit code 2" in text


def test_the_same_refusal_of_all_ranks_is_shown_once(tmp_path, capfd):
    assert run(tmp_path, "print('error: bad data', file=sys.stderr); sys.exit(2)") == 2
    text = "".join(capfd.readouterr())
    assert text == "error: bad data\n"


def test_a_killed_worker_is_named_with_a_likely_cause(tmp_path, capfd):
    assert run(tmp_path, "os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else None") == 70
    assert "rank 0 was killed by SIGKILL (often the machine ran out of memory" in "".join(
        capfd.readouterr()
    )


@pytest.mark.parametrize("deaf", [False, True])
def test_a_dead_worker_takes_the_others_along(tmp_path, monkeypatch, deaf):
    monkeypatch.setattr(workers, "FAILURE_GRACE_S", 0.3)
    monkeypatch.setattr(workers, "TERMINATE_GRACE_S", 0.3)
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if deaf else ""
    body = ignore + "sys.exit(1) if rank else time.sleep(600)"
    started = time.monotonic()
    assert run(tmp_path, body) == 1
    assert time.monotonic() - started < 300


def test_the_shipped_grace_is_seconds():
    assert SHIPPED_GRACE_S + workers.TERMINATE_GRACE_S < 15
    assert workers.STOP_LIMIT_S >= 600, "a checkpoint of a large model must fit"


def test_a_worker_that_outlives_the_stop_is_ended(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(workers, "STOP_LIMIT_S", 0.3)
    assert run(tmp_path, "time.sleep(600) if rank else sys.exit(75)") == 1
    assert "ranks [1] still ran" in "".join(capfd.readouterr())


def test_a_worker_that_was_asked_alone_stops_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "FOLLOW_S", 0.1)
    body = f"""
if rank:
    while not Path(sys.argv[1], "ready0").exists():
        time.sleep(0.01)
    sys.exit(75)
{TRAINER}"""
    worker = script(tmp_path, body)
    command = [sys.executable, str(worker), str(tmp_path), "0"]
    assert run_workers(command, 2, tmp_path / "logs") == 75
    assert (tmp_path / "saved0").exists()


def test_the_port_of_rank_0_is_not_one_that_the_system_gives_to_others():
    given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    with socket.socket() as other:
        port = workers.free_port()
        assert workers.FIRST_PORT <= port < given
        other.bind(("127.0.0.1", port))


def test_environment_is_torchruns(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)))
    environment = worker_environment(1, 2, 4000)
    assert environment["RANK"] == environment["LOCAL_RANK"] == "1"
    assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "2"
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("127.0.0.1", "4000")
    assert environment["OMP_NUM_THREADS"] == "3"
    assert worker_environment(0, 16, 4000)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert worker_environment(0, 2, 4000)["OMP_NUM_THREADS"] == "5"


class Terminal:
    """A command under a pseudo-terminal, where Ctrl-C reaches the whole foreground group."""

    def __init__(self, command: list[str]):
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execv(command[0], command)
        self.text = ""

    def press_ctrl_c(self) -> None:
        os.write(self._fd, b"\x03")

    def close(self) -> None:
        os.close(self._fd)

    def finish(self, seconds: float = 120) -> int:
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if not select.select([self._fd], [], [], 0.1)[0]:
                continue
            try:
                self.text += os.read(self._fd, 65536).decode()
            except OSError:  # the other end is closed
                return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"still running after {seconds} s: {self.text}")


def test_ctrl_c_at_a_terminal_saves_on_all_ranks(tmp_path):
    terminal = Terminal(launcher(tmp_path, saving=REPEAT_WINDOW_S + 0.5))
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    terminal.press_ctrl_c()
    assert terminal.finish() == 75
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()
    assert terminal.text.count(STOPPING) == 1
    assert "Traceback" not in terminal.text
    assert "Traceback" not in (tmp_path / "logs" / "rank_1.log").read_text()


def test_closing_the_terminal_saves_on_all_ranks(tmp_path):
    terminal = Terminal(launcher(tmp_path, saving=0.2))
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    terminal.close()
    wait_for(tmp_path / "saved0", tmp_path / "saved1")


def test_a_second_ctrl_c_ends_everything_at_once(tmp_path):
    terminal = Terminal(launcher(tmp_path, saving=600))
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    terminal.press_ctrl_c()
    time.sleep(REPEAT_WINDOW_S + 0.3)
    terminal.press_ctrl_c()
    assert terminal.finish() == 130
    assert not (tmp_path / "saved0").exists()
    assert "Traceback" not in terminal.text


def test_a_second_ctrl_c_ends_workers_that_cannot_hear_it(tmp_path, monkeypatch):
    """As one that waits in a collective: no Python handler runs there."""
    deaf = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nPath(sys.argv[1], f'ready{rank}').touch()"
    worker = script(tmp_path, deaf + "\ntime.sleep(600)")
    short = LAUNCHER.replace(
        "import sys", "import sys, pretrain.processes.workers as w; w.INTERRUPT_GRACE_S = 0.3", 1
    )
    command = [sys.executable, "-c", short, str(worker), str(tmp_path), str(tmp_path)]
    terminal = Terminal(command)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    terminal.press_ctrl_c()
    time.sleep(REPEAT_WINDOW_S + 0.3)
    terminal.press_ctrl_c()
    assert terminal.finish() == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_the_launcher_alone_reaches_the_workers(tmp_path, number):
    process = subprocess.Popen(launcher(tmp_path, saving=0.2), stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    process.send_signal(number)
    assert process.wait(timeout=120) == 75
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()


def test_a_signal_to_the_whole_group_is_one_request(tmp_path):
    """As a batch system signals every process of a step."""
    process = subprocess.Popen(
        launcher(tmp_path, saving=1), stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 75
    assert (tmp_path / "saved1").exists()


def test_workers_stopped_before_they_listen_count_as_resumable(tmp_path):
    body = "Path(sys.argv[1], f'ready{rank}').touch()\ntime.sleep(600)"
    worker = script(tmp_path, body)
    command = [sys.executable, "-c", LAUNCHER, str(worker), str(tmp_path), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75


def test_workers_stop_when_the_launcher_is_killed(tmp_path):
    process = subprocess.Popen(launcher(tmp_path, saving=0.1), stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    process.kill()
    process.wait()
    wait_for(tmp_path / "saved0", tmp_path / "saved1")


def test_a_worker_that_stands_still_ends_when_the_launcher_is_killed(tmp_path):
    process = subprocess.Popen(launcher(tmp_path, saving=0.1), stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    stopped = next(pid for pid in children if b"RANK=1" in environment_of(pid))
    os.kill(int(stopped), signal.SIGSTOP)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(tmp_path / "saved0", tmp_path / "saved1")  # let go on, it heard that it has to stop


def environment_of(pid):
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def run_config(folder: Path, **data):
    return config_from_dict(
        {
            "run": {"dir": str(folder / "run"), "steps": 1},
            "model": {"pattern": "M", "hidden_size": 64, "num_heads": 2, "vocab_size": 64},
            "data": {"path": str(folder), "seq_len": 8, "global_batch": 2, "micro_batch": 1} | data,
            "layout": {"tensor": 2},
        }
    )


def test_launch_refuses_before_any_process_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "run_workers", lambda *args: pytest.fail("started workers"))
    with pytest.raises(ConfigError, match="3 processes cannot hold"):
        launch.launch("run.yaml", run_config(tmp_path), 3)
    with pytest.raises(ConfigError, match=r"data.path=.*nowhere.* is not a folder"):
        launch.launch("run.yaml", run_config(tmp_path, path=str(tmp_path / "nowhere")), 2)


def test_launch_refuses_more_processes_than_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "run_workers", lambda *args: pytest.fail("started workers"))
    monkeypatch.setattr(devices, "count_gpus", lambda: 1)
    with pytest.raises(ConfigError, match="2 processes need 2 GPUs"):
        launch.launch("run.yaml", run_config(tmp_path), 2)


def test_launch_starts_one_replica_and_passes_the_overrides_on(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "run_workers", lambda *args: seen.append(args) or 75)
    assert launch.launch("run.yaml", run_config(tmp_path), None, ["--run.steps", "1"]) == 75
    command, nproc, logs, phases = seen[0]
    assert command[1:] == ["-m", "pretrain", "train", "run.yaml", "--run.steps", "1"]
    assert nproc == 2
    assert (logs, phases) == (tmp_path / "run" / "logs" / "life-000001", tmp_path / "run" / "logs")


def test_every_start_has_logs_of_its_own(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "run_workers", lambda *args: seen.append(args[2].name) or 0)
    for _ in range(2):
        launch.launch("run.yaml", run_config(tmp_path), 2)
        with Lease.take(tmp_path / "run"):
            pass
    assert seen == ["life-000001", "life-000002"]


def test_an_unwritable_run_folder_is_refused(tmp_path):
    (tmp_path / "logs").write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=re.escape("choose another run.dir")):
        run(tmp_path, "time.sleep(600)")
