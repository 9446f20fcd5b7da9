"""Commands in forks of a warm Python behave like fresh processes, as far as the tests use them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.warm_python.client import WarmProcess

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(tmp_path):
    """A module from its source: its name; it is found in tmp_path."""

    def write(source):
        (tmp_path / "stage.py").write_text(source)
        return "stage"

    return write


def run(python, *words, **options):
    return subprocess.run(
        [python, "-m", *words], capture_output=True, text=True, timeout=60, **options
    )


def test_words_folder_environment_and_files_are_the_clients(warm_python, module, tmp_path):
    name = module("""
import os, sys
print(sys.argv[1:], os.getcwd(), os.environ["ONE"], "TWO" in os.environ, __name__)
print(sys.stdin.read(), file=sys.stderr)
sys.exit(75)
""")
    os.environ["TWO"] = "2"
    try:
        environment = {key: value for key, value in os.environ.items() if key != "TWO"}
        environment["ONE"] = "1"
        done = run(
            warm_python.executable,
            *(name, "a b", "c"),
            input="asked",
            cwd=tmp_path,
            env=environment,
        )
    finally:
        del os.environ["TWO"]
    assert done.returncode == 75
    assert done.stdout == f"['a b', 'c'] {tmp_path} 1 False __main__\n"
    assert done.stderr == "asked\n"


def test_imports_are_there_and_threads_are_those_of_the_environment(warm_python, module, tmp_path):
    name = module("""
import sys
assert "pretrain.trainer" in sys.modules and "deepspeed" not in sys.modules
import torch
print(torch.get_num_threads(), (torch.ones(1000, 1000) @ torch.ones(1000, 1)).sum().item())
""")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run(warm_python.executable, name, cwd=tmp_path, env=environment)
    assert done.stdout == "1 1000000.0\n", done.stderr


def test_its_own_children_are_warm_too(warm_python, module, tmp_path):
    name = module("""
import subprocess, sys
if len(sys.argv) > 1:
    sys.exit("torch" not in sys.modules)
sys.exit(subprocess.run([sys.executable, "-m", "stage", "child"]).returncode)
""")
    assert run(warm_python.executable, name, cwd=tmp_path).returncode == 0


def test_an_error_is_a_traceback_and_a_signal_is_passed_on(warm_python, module, tmp_path):
    done = run(warm_python.executable, module("1 / 0"), cwd=tmp_path)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    name = module("import time\nprint('ready', flush=True)\ntime.sleep(60)")
    process = subprocess.Popen(
        [warm_python.executable, "-m", name], cwd=tmp_path, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM


def gone(pid):
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.01)
    return False


def test_a_command_whose_client_was_killed_is_killed(warm_python, module, tmp_path):
    name = module("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)")
    process = subprocess.Popen(
        [warm_python.executable, "-m", name], cwd=tmp_path, stdout=subprocess.PIPE
    )
    pid = int(process.stdout.readline())
    assert pid != process.pid
    process.kill()
    process.communicate(timeout=20)
    assert gone(pid)


def test_a_process_of_the_class_is_polled_and_killed(warm_python, module, tmp_path):
    name = module("import time\ntime.sleep(60)")
    process = WarmProcess(warm_python.server, ["-m", name], cwd=tmp_path)
    assert process.poll() is None
    with pytest.raises(TimeoutError):
        process.wait(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(20) == process.poll() == -signal.SIGKILL
    process.send_signal(signal.SIGTERM)  # to nobody


def test_the_client_imports_little():
    """Each command pays for it."""
    script = f"""
import sys
sys.path.append({str(ROOT)!r})
import tests.warm_python.client
print(len(sys.modules))
"""
    count = subprocess.check_output([sys.executable, "-I", "-S", "-c", script])
    assert int(count) < 80
