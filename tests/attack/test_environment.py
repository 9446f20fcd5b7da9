"""A run whose files are gone, damaged or something else: it goes on alike, or says one message.

Every row is a place and what is wrong with it. By command all of them:
`python -m pytest tests/attack --attacks 1000`.
"""

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest

from tests.warm_python.client import WarmProcess
from xlstm_io.errors import ExitCode

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "0.1.0"
SECONDS = 60  # a run of a step takes one or two
ALLOWED = (ExitCode.DONE, ExitCode.BAD_INPUT, ExitCode.MACHINE_FAILED, ExitCode.STOPPED)
PLACES = (
    "run.yaml",
    "run",
    "run/metrics.jsonl",
    "run/history.jsonl",
    "run/progress.json",
    "run/lease.json",
    "run/lives",
    "run/lives/000001.json",
    "run/logs",
    "run/starts",
    "run/config.yaml",
    "run/checkpoints",
    "run/checkpoints/step-00000002-*",
    "run/checkpoints/step-00000002-*/manifest.json",
    "run/checkpoints/step-00000002-*/metadata.json",
    "run/checkpoints/step-00000002-*/data-00000.safetensors",
    "shards",
    "shards/manifest.json",
    "shards/corpus/train/shard-00000000.tar",
    "shards/corpus/train/shard-00000000.idx.npz",
    "shards/tokenizer/tokenizer.model",
)


def gone(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def other_kind(path):
    """A folder in the place of a file, a file in the place of a folder."""
    was_folder = path.is_dir()
    gone(path)
    path.touch() if was_folder else path.mkdir()


def fifo(path):
    gone(path)
    os.mkfifo(path)


def device(path):
    gone(path)
    path.symlink_to("/dev/full")


def broken_link(path):
    gone(path)
    path.symlink_to("nowhere")


def loop(path):
    gone(path)
    path.symlink_to(path.name)


def empty(path):
    if path.is_dir():
        shutil.rmtree(path)
        path.mkdir()
    else:
        path.write_bytes(b"")


def garbage(path):
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        file.write_bytes(b"\x80\xff[[{\x00" + file.read_bytes()[7:])


def future(path):
    for file in (path, *path.rglob("*")):
        os.utime(file, (time.time() + 3e8,) * 2)


FAULTS = (gone, other_kind, fifo, device, broken_link, loop, empty, garbage, future)
ROWS = [(place, fault) for place in PLACES for fault in FAULTS]


def train(python, folder, steps):
    """Train in a folder; the exit code (None: still running after a minute) and what was said."""
    log = folder / "said"
    words = ["-m", "pretrain", "train", "run.yaml", "--run.steps", steps]
    words += ["--checkpoint.interval", "1", "--evaluation.interval", "2"]
    with open(log, "wb") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = WarmProcess(python.server, words, environment, output.fileno(), folder)
        try:
            code = process.wait(SECONDS)
        except TimeoutError:
            process.send_signal(9)
            code = None
    return code, log.read_text(errors="replace")


def losses(folder):
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, warm_python):
    """A run of two steps, and the losses of three."""
    folder = tmp_path_factory.mktemp("trained") / "sound"
    shutil.copytree(GOLDEN, folder, ignore=shutil.ignore_patterns("run"))
    assert train(warm_python, folder, 2)[0] == 0
    whole = Path(shutil.copytree(folder, folder.with_name("whole"), symlinks=True))
    assert train(warm_python, whole, 3)[0] == 0
    return folder, losses(whole)


def test_a_damaged_environment_is_survived_or_one_message(trained, warm_python, pytestconfig):
    sound, expected = trained
    share = pytestconfig.getoption("--attacks")
    rows = ROWS if share >= 1000 else random.Random(0).sample(ROWS, share // 5)
    faults = []
    for place, fault in rows:
        folder = Path(shutil.copytree(sound, sound.with_name("row"), symlinks=True))
        (path,) = folder.glob(place)
        fault(path)
        code, said = train(warm_python, folder, 3)
        problem = ""
        if code not in ALLOWED:
            problem = f"exit code {code}"
        elif "Traceback" in said:
            problem = "a traceback"
        elif code == 0 and losses(folder)[3] != expected[3]:
            problem = f"another loss: {losses(folder)}, not {expected}"
        elif code != 0 and said.count("error:") != 1:
            problem = f"{said.count('error:')} messages"
        if problem:
            faults.append(f"{place}, {fault.__name__}: {problem}:\n{said[-1500:]}")
        shutil.rmtree(folder)
    assert not faults, "\n\n".join(faults)
