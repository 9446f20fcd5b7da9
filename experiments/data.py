"""The data of a grid: shards of a synthetic task, of text that every machine has, or given ones."""

import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.claim import Claim
from experiments.definition import Cell, ShardsData, TaskData, TextData
from experiments.grid import Grid
from xlstm_io.errors import ConfigError, ExitCode, Interrupted, PrepError
from xlstm_io.shards.manifest import load_manifest
from xlstm_io.signals import signal_at_parents_death
from xlstm_io.storage import absolute, write_atomic
from xlstm_io.terminal import say

TRAINING_FOLDER = "train"
_VALID_FRACTION_OF_PACKAGES = "0.2"  # a package has tens of files
_LONGER = "validation-"  # before the length of a folder's rows or samples


def prepare(grid: Grid, cells: Sequence[Cell]) -> None:
    """Make the shards of some cells, once; of several processes one makes them and others wait.

    Raises:
        PrepError: the data cannot be made as the definition says, or the folder holds others.
        Interrupted: a command that makes them was asked to stop.
    """
    for name in dict.fromkeys(data_name(grid, cell) for cell in cells):
        data, folder = grid.size.data[name], data_folder(grid, name)
        claim = Claim(grid.folder / "claims" / f"data-{name}")
        told = False
        while not claim.take():
            if not told:
                say(f"data {name}: {claim.owner() or 'another'} makes them; waiting")
                told = True
            time.sleep(1.0)
        with claim.held():
            if isinstance(data, TaskData):
                from data_prep.synthetic.corpus import write_corpora

                write_corpora(data.task, task_of(data, folder))
            elif isinstance(data, ShardsData):
                _link(data, folder / TRAINING_FOLDER)
            else:
                _make_text(data, folder)


def data_name(grid: Grid, cell: Cell) -> str:
    """Which of a grid's data a cell is trained on."""
    return str(cell.values["data"]) if "data" in cell.values else next(iter(grid.size.data))


def data_folder(grid: Grid, name: str) -> Path:
    """Where the shards of one of a grid's data lie."""
    return grid.folder / "data" / name


def validation_folders(folder: Path, trained: str) -> dict[str, Path]:
    """The folders of shards that cells are measured on, by length; that of training as `trained`.

    Args:
        folder: of one of a grid's data.
        trained: the key of the folder that is trained on.
    """
    found = {}
    for shards in sorted(folder.iterdir()):
        if (shards / "manifest.json").exists():
            at_training = shards.name == TRAINING_FOLDER
            found[trained if at_training else shards.name.removeprefix(_LONGER)] = shards
    return found


def task_of(data: TaskData, out: Path) -> Any:
    """The synthetic task of a definition, which will be written to `out`.

    Raises:
        ConfigError: there is no such task, or it has no such option.
    """
    from data_prep.synthetic.command import TASKS

    if data.task not in TASKS:
        raise ConfigError(f"there is no task {data.task!r}; use one of {', '.join(TASKS)}")
    try:
        return TASKS[data.task](out=out, **data.options)
    except TypeError as error:
        raise ConfigError(f"task {data.task}: {error}") from error


def _link(data: ShardsData, link: Path) -> None:
    """Let the grid's folder of shards be the one that somebody has built."""
    shards = Path(data.path)
    if not (shards / "manifest.json").exists():
        raise ConfigError(f"{shards} holds no shards; build them first: {data.build}")
    seq_len = load_manifest(shards).seq_len
    if seq_len != data.seq_len:
        raise ConfigError(
            f"{shards} has rows of {seq_len} tokens, and this size needs {data.seq_len}; build "
            f"them again: {data.build}"
        )
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.unlink(missing_ok=True)  # one that leads nowhere
        link.symlink_to(absolute(shards), target_is_directory=True)


def _sources(packages: Sequence[str]) -> list[dict[str, str]]:
    """Packages of Python's standard library as the sources of a build."""
    library = Path(sysconfig.get_path("stdlib"))
    return [{"name": name, "input": str(library / name)} for name in packages]


def _make_text(data: TextData, folder: Path) -> None:
    """Collect Python's standard library, train a tokenizer on it and pack it; what is made stays.

    The commands are those of the demo (`pretrain.commands.run.demo`). Packages are read from where
    the library lies, each as a source of its own.
    """
    from pretrain.commands.run.demo import Places, Text, data_commands

    work, shards = folder / "work", folder / TRAINING_FOLDER
    places = Places(work, work / "run")
    collect, tokenizer, build, _ = data_commands(
        places, Text(vocab_size=data.vocab_size), data.seq_len
    )
    build[build.index("--out") + 1] = str(shards)
    if data.packages:
        prep = work / "prep.yaml"
        write_atomic(prep, yaml.safe_dump({"sources": _sources(data.packages)}).encode())
        at = build.index("--input")
        build[at : at + 2] = []
        build.insert(build.index("build") + 1, str(prep))
        build[build.index("--valid-fraction") + 1] = _VALID_FRACTION_OF_PACKAGES
    commands = [collect, tokenizer, build]
    for length in data.longer:
        out = str(folder / f"{_LONGER}{length}")
        commands.append(
            ["data_prep", "repack", str(shards), "--seq-len", str(length), "--out", out]
        )
    for command in commands:
        say(f"python -m {' '.join(command)}")
        code = _run_command(command)
        if code == ExitCode.STOPPED:
            raise Interrupted
        if code != ExitCode.DONE:
            raise PrepError(f"`python -m {' '.join(command)}` ended with {code}")


def _run_command(words: Sequence[str]) -> int:
    """The exit code of a command of ours, which ends when this process is stopped or killed.

    Whoever takes over the data finds nobody else writing them.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        preexec_fn=lambda: signal_at_parents_death(signal.SIGTERM),
    )
    try:
        return process.wait()
    except BaseException:  # a request to stop
        process.terminate()
        process.wait()
        raise
