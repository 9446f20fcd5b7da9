"""Imports from URLs and to URLs, and imports that were stopped."""

import fcntl
import os
import shutil

import pytest
import torch

from tests import fake_object_store
from tests.xlstm_mcore.convert.small import refused
from tests.xlstm_mcore.convert.test_import import tensors_of, write_case
from xlstm_io import storage, tensor_files
from xlstm_io.checkpoint import streamed
from xlstm_io.checkpoint.manifest import resolve, step_folders
from xlstm_io.checkpoint.tokenizer import tokenizer_of
from xlstm_mcore.convert import cli

pytestmark = pytest.mark.usefixtures("few_texts")


def equal(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.fixture(autouse=True)
def store():
    fake_object_store.register()


def test_a_folder_behind_a_url_is_imported_with_its_tokenizer(saved, exported, tmp_path):
    _, checkpoint, _ = saved
    url = f"objects://{tmp_path}/bucket/theirs"
    assert cli.main(["to-hf", str(checkpoint), url, "--shard-size", "1MB"]) == 0
    assert (tmp_path / "bucket/theirs/model.safetensors.index.json").exists()
    assert cli.main(["from-hf", url, f"objects://{tmp_path}/bucket/run"]) == 0
    assert cli.main(["from-hf", str(exported[2]), str(tmp_path / "local")]) == 0
    far, near = resolve(f"objects://{tmp_path}/bucket/run"), resolve(tmp_path / "local")
    assert equal(tensors_of(far), tensors_of(near))
    assert tokenizer_of(far).sha256 == tokenizer_of(checkpoint).sha256


def test_a_state_dict_behind_a_url(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(storage, "PORTION_BYTES", 1000)  # smaller than a tensor
    command, _, ours = write_case(tmp_path / "theirs", "large")
    url = f"objects://{tmp_path}/theirs/model.safetensors"
    assert cli.main([command, url, str(tmp_path / "run")]) == 0
    assert equal(tensors_of(resolve(tmp_path / "run")), ours)
    out = tmp_path / "out"
    gone = f"objects://{tmp_path}/theirs/gone.safetensors"
    assert "gone.safetensors: no such file or folder" in refused(capsys, command, gone, out)
    torch.save(ours, tmp_path / "theirs/model.pt")
    message = refused(capsys, command, f"objects://{tmp_path}/theirs/model.pt", out)
    assert "is read from a local folder alone" in message
    assert "nothing://" in refused(capsys, command, "nothing://bucket/model", out)
    assert not out.exists()


@pytest.mark.parametrize("answer", [b"", b"x" * 200])
def test_a_server_without_ranges_is_named(tmp_path, capsys, monkeypatch, answer):
    write_case(tmp_path / "theirs", "large")

    def whole(self, path, start=None, end=None, **options):
        return answer

    monkeypatch.setattr(fake_object_store.ObjectStore, "cat_file", whole)
    url = f"objects://{tmp_path}/theirs/model.safetensors"
    message = refused(capsys, "from-nxai", url, tmp_path / "out")
    assert ("sends whole files only" if answer else "too early") in message


@pytest.fixture
def stopped(exported, tmp_path, monkeypatch):
    """(the folder to import, where, the one attempt in there) after an import lost its disk."""
    theirs = shutil.copytree(exported[2], tmp_path / "theirs")
    monkeypatch.setattr(streamed, "DATA_FILE_BYTES", 300_000)
    write, left = streamed.write_data_file, iter(range(3))

    def fails(path, number, *arguments):
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        return write(path, number, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(streamed, "write_data_file", fails)
        assert cli.main(["from-hf", str(theirs), str(tmp_path / "run")]) == 70
    (attempt,) = step_folders(tmp_path / "run")
    assert (attempt / streamed.PROGRESS).exists() and not (attempt / "manifest.json").exists()
    return theirs, tmp_path / "run", attempt


def again(theirs, out, monkeypatch):
    """Numbers of the data files that a second import writes."""
    write, written = streamed.write_data_file, []

    def noted(path, number, *arguments):
        written.append(number)
        return write(path, number, *arguments)

    monkeypatch.setattr(streamed, "write_data_file", noted)
    assert cli.main(["from-hf", str(theirs), str(out)]) == 0
    assert not (resolve(out) / streamed.PROGRESS).exists()
    return written


def same(out, exported, tmp_path):
    assert cli.main(["from-hf", str(exported[2]), str(tmp_path / "whole")]) == 0
    return equal(tensors_of(resolve(out)), tensors_of(resolve(tmp_path / "whole")))


def test_a_stopped_import_keeps_what_is_finished(exported, stopped, tmp_path, monkeypatch, capsys):
    theirs, out, attempt = stopped
    assert again(theirs, out, monkeypatch)[0] == 3
    assert resolve(out) == attempt and same(out, exported, tmp_path)
    assert "an import was stopped here" in capsys.readouterr().err


def test_what_was_damaged_meanwhile_is_written_again(exported, stopped, tmp_path, monkeypatch):
    theirs, out, attempt = stopped
    file = attempt / "data-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert again(theirs, out, monkeypatch)[0] == 1
    assert same(out, exported, tmp_path)


@pytest.mark.parametrize("damage", ["other source", "progress", "plan"])
def test_remains_of_something_else_are_removed(exported, stopped, tmp_path, monkeypatch, damage):
    theirs, out, attempt = stopped
    progress = attempt / streamed.PROGRESS
    if damage == "other source":
        os.utime(theirs / "model.safetensors", (1, 1))
    elif damage == "progress":
        progress.write_bytes(progress.read_bytes().replace(b'"begin"', b'"Begin"')[:-9])
    else:
        progress.write_text(progress.read_text().replace('"plan": "', '"plan": "0'))
    assert again(theirs, out, monkeypatch)[0] == 0
    assert not attempt.exists() and same(out, exported, tmp_path)


def test_two_imports_do_not_write_into_one_attempt(stopped, capsys):
    theirs, out, attempt = stopped
    folder = os.open(attempt, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    message = refused(capsys, "from-hf", theirs, out).splitlines()[-1]
    assert "another conversion is writing" in message and attempt.exists()
    os.close(folder)


def test_a_file_that_breaks_in_mid_import_leaves_nothing(exported, tmp_path, monkeypatch, capsys):
    """What is wrong with the input would be wrong again; a disk or a network may heal."""
    read = tensor_files._Safetensors.read

    def broken(self, name):
        if "blocks.1" in name:
            raise tensor_files.TensorFileError("it is not what it was")
        return read(self, name)

    monkeypatch.setattr(tensor_files._Safetensors, "read", broken)
    assert "not what it was" in refused(capsys, "from-hf", exported[2], tmp_path / "run")
    assert not step_folders(tmp_path / "run")
