"""SIGKILL at ten points of a conversion: nothing half-written loads, and the command goes on."""

import os

import pytest

from tests import fake_object_store
from tests.warm_python.client import WarmProcess
from tests.xlstm_mcore.convert.killed import DATA_FILE_BYTES
from xlstm_io.checkpoint import streamed
from xlstm_io.checkpoint.manifest import find_latest, step_folders, verify_hashes
from xlstm_io.checkpoint.reader import CheckpointReader
from xlstm_mcore.convert import cli
from xlstm_mcore.convert.tokenizer import corpus

POINTS = 10


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    fake_object_store.register()
    monkeypatch.setattr(corpus, "TEXTS", 20)
    monkeypatch.setattr(streamed, "DATA_FILE_BYTES", DATA_FILE_BYTES)


def export(out):
    return ["to-hf", "--no-verify", "--shard-size", "1MB", *map(str, out)]


def contents(folder):
    """Bytes by name of a folder of ours; None where there is none."""
    if not folder.is_dir():
        return None
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed_at(python, folder, words, tmp_path):
    """A function that kills the command before what it does for the n-th time, and the count."""

    def run(number):
        with open(tmp_path / "output", "w+") as output:
            command = ["-m", "tests.xlstm_mcore.convert.killed", number, folder, *words]
            code = WarmProcess(python.server, command, output=output.fileno()).wait(60)
            output.seek(0)
            return code, output.read()

    return run


def evenly(total):
    """Ten numbers from the first to the last."""
    return sorted({1 + round(n * (total - 1) / (POINTS - 1)) for n in range(POINTS)})


@pytest.mark.parametrize("place", ["local", "url"])
def test_a_killed_export_goes_on(saved, tmp_path, warm_python, capsys, place):
    _, checkpoint, _ = saved
    assert cli.main(export([checkpoint, tmp_path / "whole"])) == 0
    whole = contents(tmp_path / "whole")
    assert len([name for name in whole if name.endswith(".safetensors")]) > 1
    folder = tmp_path / "place"
    out = folder / "hf" if place == "local" else f"objects://{folder}/hf"
    folder.mkdir()
    run = killed_at(warm_python, folder, export([checkpoint, out]), tmp_path)
    code, output = run(0)
    assert code == 0, output
    total = int(output.split()[-1])
    for number in evenly(total):
        for path in (folder / "hf").iterdir():
            path.unlink()
        (folder / "hf").rmdir()
        code, output = run(number)
        assert code == -9, output
        left = contents(folder / "hf")
        # No program loads a folder without config.json.
        assert left is None or "config.json" not in left or left.items() >= whole.items()
        assert cli.main(export([checkpoint, out])) == 0
        assert contents(folder / "hf") == whole, f"killed at {number} of {total}"
        assert os.listdir(folder) == ["hf"]


@pytest.mark.parametrize("place", ["local", "url"])
def test_a_killed_import_goes_on(exported, tmp_path, warm_python, capsys, place):
    _, _, theirs = exported
    folder = tmp_path / "place"
    folder.mkdir()
    out = folder / "run" if place == "local" else f"objects://{folder}/run"
    words = ["from-hf", str(theirs), str(out)]
    run = killed_at(warm_python, folder, words, tmp_path)
    code, output = run(0)
    assert code == 0, output
    total = int(output.split()[-1])
    whole = data_of(folder / "run")
    kept = set()
    for number in evenly(total):
        (folder / "run").rename(tmp_path / f"before {number}")
        code, output = run(number)
        assert code == -9, output
        assert find_latest(folder / "run") is None or data_of(folder / "run") == whole
        complete = find_latest(folder / "run") is not None
        capsys.readouterr()
        assert cli.main(words) == (2 if complete else 0)
        told = capsys.readouterr().err
        assert not complete or "holds a checkpoint already" in told
        kept.add("tensors are kept" in told)
        assert data_of(folder / "run") == whole, f"killed at {number} of {total}"
        assert len(step_folders(folder / "run")) == 1
    assert kept == {True, False}


def data_of(root):
    """The data files of the one complete checkpoint below a folder, once their hashes are right."""
    path = find_latest(root)
    with CheckpointReader(path) as reader:
        verify_hashes(path, reader.manifest)
        names = sorted(set(reader.manifest.files) - {"metadata.json"})
    assert sum(name.startswith("data-") for name in names) > 2
    return {name: (path / name).read_bytes() for name in names}
