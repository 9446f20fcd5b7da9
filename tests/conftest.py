"""Options of the whole suite, and what every test finds: signals as usual, and no GPU."""

import gc
import importlib
import os
import signal
import sys
import zlib
from pathlib import Path

import pytest

from tests.minutes_per_folder import MinutesPerFolder
from tests.warm_python import start

GPU_TESTS = Path(__file__).parent / "gpu"
MANY_FILES = 300

# What a shell starts in the background ignores Ctrl-C, under nohup the end of the terminal too, and
# so would all its children; some tests send both.
for number, usual in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


def pytest_addoption(parser):
    parser.addoption(
        "--dist-share",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="run this share of the tests that start several processes, the same ones every time",
    )
    parser.addoption(
        "--dist-draw",
        type=int,
        default=0,
        metavar="N",
        help="another draw of them, as the share of another stack",
    )
    parser.addoption(
        "--attacks",
        type=int,
        default=30,
        metavar="N",
        help="damaged inputs for each reader in tests/attack",
    )
    parser.addoption(
        "--moments",
        type=int,
        default=4,
        metavar="N",
        help="random moments of evaluation and start-up at which tests stop or kill a run",
    )
    parser.addoption(
        "--random-runs",
        type=int,
        default=150,
        metavar="N",
        help="tests/pretrain/test_check_and_build.py: how many run files to draw",
    )
    parser.addoption(
        "--all-layouts",
        action="store_true",
        help="tests/dist/test_layouts_end_to_end.py: every layout of the matrix, not a sample; "
        "tests/slurm: every way to place ranks on nodes",
    )
    parser.addoption(
        "--many-ranks",
        action="store_true",
        help="tests/dist/test_many_ranks.py: layouts of 16 processes, and 300 steps",
    )
    parser.addoption(
        "--round-trips",
        type=int,
        default=2,
        metavar="N",
        help="tests/dist/test_round_trips.py: architectures to draw; 16 or more on all layouts",
    )
    parser.addoption(
        "--budget", action="store_true", help="print the minutes per folder beside what is planned"
    )


def pytest_configure(config):
    if not only_gpu_tests(config.args, config.invocation_params.dir):
        hide_gpus()
    if config.getoption("--budget"):
        config.pluginmanager.register(MinutesPerFolder())


def only_gpu_tests(arguments, folder):
    """Whether pytest was asked for files of tests/gpu and nothing else."""
    paths = [(folder / argument.split("::")[0]).resolve() for argument in arguments]
    return bool(paths) and all(path.is_relative_to(GPU_TESTS) for path in paths)


def hide_gpus():
    """Hide the GPUs from this process and its children, before torch asks for them.

    The suite runs on the CPU by design: on a machine with one GPU, four ranks would ask NCCL for
    four.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config, items):
    """Keep a sample of the distributed tests, drawn by their names and the number of the draw."""
    share, draw = config.getoption("--dist-share"), config.getoption("--dist-draw")
    left_out = [
        item
        for item in items
        if "dist" in item.keywords and zlib.crc32(f"{draw} {item.nodeid}".encode()) >= share * 2**32
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def warm_python():
    """A Python that starts `python -m NAME` within milliseconds; see tests/warm_python."""
    with start.start() as python:
        yield python


@pytest.fixture(scope="module", autouse=True)
def no_process_group_is_left():
    """Leave the process groups that a module joined, so that the next one can join its own.

    Tools that run a model in this process join a group of one and keep it, as a command may. Which
    module comes next depends on how pytest-xdist spreads them.

    The groups of a run keep their 70 sockets and pipes until Python finds that its model, which
    refers to itself, is in nobody's hands. In a process with as many objects as this one that can
    take hours: one had more than 1,024 open, and select() knows no more.
    """
    yield
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_initialized():
        importlib.import_module("pretrain.layout").leave()
    if len(os.listdir("/proc/self/fd")) > MANY_FILES:
        gc.collect()
