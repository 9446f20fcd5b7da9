"""Saving while training goes on, in one process."""

import errno
import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.checkpoint import (
    CheckpointError,
    CheckpointSaver,
    Ranks,
    TensorSlice,
    find_latest,
    host_copy,
)
from pretrain.checkpoint import background as background_module
from pretrain.checkpoint.host_copy import HostCopy
from tests.pretrain.checkpoints import first_value, slices_of
from xlstm_io.checkpoint import evaluation as evaluation_module
from xlstm_io.checkpoint import writer
from xlstm_io.checkpoint.evaluation import Evaluation, read_evaluation
from xlstm_io.checkpoint.manifest import parse_manifest
from xlstm_io.errors import UserError

WAIT_S = 20.0


@pytest.fixture
def gate(monkeypatch):
    """Holds every write until it is opened."""
    opened, real = threading.Event(), writer.write_safetensors

    def write(*args):
        assert opened.wait(WAIT_S)
        return real(*args)

    monkeypatch.setattr(writer, "write_safetensors", write)
    return opened


def test_training_goes_on_while_a_copy_is_written(tmp_path, gate):
    slices = slices_of(1)
    with CheckpointSaver(tmp_path) as saver:
        saver.save(slices, {}, {}, step=1)
        slices[0].tensor.fill_(2)  # the next step
        assert find_latest(tmp_path) is None and saver.take_finished() is None
        gate.set()
        saver.wait()
        done = saver.take_finished()
        assert done.path == saver.last_good == find_latest(tmp_path)
        assert 0 < done.stall < done.seconds
        assert saver.take_finished() is None
    assert first_value(done.path) == 1


def test_a_second_save_waits_for_the_first(tmp_path, gate):
    slices = slices_of(1)
    with CheckpointSaver(tmp_path) as saver:
        saver.save(slices, {}, {}, step=1)
        threading.Timer(0.05, gate.set).start()
        saver.save(slices_of(2), {}, {}, step=2)
        assert find_latest(tmp_path) is not None, "the first one is complete"
    assert first_value(find_latest(tmp_path)) == 2 and len(list(tmp_path.iterdir())) == 2


def test_nothing_but_the_copy_happens_in_the_loop(tmp_path, monkeypatch):
    """No collective, no serialisation, no file in the thread that trains."""
    seen = {}

    def watch(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            seen.setdefault(name, set()).add(threading.current_thread())
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in (
        (Ranks, "gather"),
        (Ranks, "broadcast"),
        (json, "dumps"),
        (os, "fsync"),
        (writer, "write_safetensors"),
        (background_module, "apply_retention"),
    ):
        watch(owner, name)
    with CheckpointSaver(tmp_path) as saver:
        saver.save(slices_of(1), {}, {}, step=1)
    assert len(seen) == 6
    assert threading.main_thread() not in set().union(*seen.values())


def test_the_host_holds_one_copy_of_the_slices_and_keeps_it():
    slices = slices_of(1, 2, 3)
    slices += [TensorSlice("t", (4, 6), (0, 0), slices[0].tensor.t())]
    host = HostCopy()
    copies = host.take(slices)
    storages = {c.tensor.untyped_storage().data_ptr(): c.tensor.untyped_storage() for c in copies}
    (memory,) = storages.values()
    assert memory.nbytes() == 4 * -(-6 * 4 * 4 // 64) * 64
    for part, copy in zip(slices, copies, strict=True):
        assert torch.equal(part.tensor, copy.tensor) and copy.tensor.is_contiguous()
    slices[0].tensor.fill_(9)
    again = host.take(slices)
    assert [a.tensor.data_ptr() for a in again] == [c.tensor.data_ptr() for c in copies]
    assert again[0].tensor[0, 0] == 9
    assert host.take(slices_of(5))[0].tensor[0, 0] == 5, "another layout gets other memory"


class OnDevice:
    """A tensor of a device: its size, and no data."""

    device, dtype, shape = SimpleNamespace(type="gpu"), torch.float32, torch.Size((6, 4))

    def numel(self):
        return 24

    def element_size(self):
        return 4


def test_memory_is_pinned_where_it_is_before_the_first_save(monkeypatch):
    pinned = []

    def pin(memory, device):
        assert device is OnDevice.device
        assert threading.current_thread() is not threading.main_thread()
        pinned.append(memory.nbytes)

    monkeypatch.setattr(host_copy.hardware, "pin", pin)
    host = HostCopy()
    host.prepare([TensorSlice(name, (6, 4), (0, 0), OnDevice()) for name in "abc"])
    host._thread.join()
    assert pinned == [3 * 128], "one block, not rounded up to a power of two"
    kept = host._copies
    host.take([TensorSlice(name, (6, 4), (0, 0), torch.ones(6, 4)) for name in "abc"])
    assert host._copies is kept and len(pinned) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere forks inherit it")
def test_forks_do_not_inherit_the_memory_of_copies():
    (copy,) = HostCopy().take(slices_of(1)[:1])
    flags, here = None, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            begin, end = (int(word, 16) for word in first.split("-"))
            here = begin <= copy.tensor.data_ptr() < end
        elif here and first == "VmFlags:":
            flags = line.split()[1:]
    assert "dc" in flags, "man 5 proc: do not copy area on fork"


def test_ordinary_memory_is_not_taken_before_the_first_save():
    host = HostCopy()
    host.prepare(slices_of(1))
    assert host._thread is None and host._copies == []


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_error_names_what_remains_and_the_next_save_works(tmp_path, monkeypatch, asynchronous):
    with CheckpointSaver(tmp_path, asynchronous=asynchronous) as saver:
        saver.save(slices_of(1), {}, {}, step=1)
        saver.wait()
        good = find_latest(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(writer, "write_safetensors", disk_full)
            with pytest.raises(CheckpointError) as caught:
                saver.save(slices_of(2), {}, {}, step=2)
                saver.wait()
        for words in ("step 2 failed", "No space left", f"last good checkpoint is {good}"):
            assert words in str(caught.value)
        assert list(tmp_path.iterdir()) == [good] and first_value(good) == 1
        assert not saver.failed, "told once"
        saver.save(slices_of(3), {}, {}, step=3)
    assert first_value(find_latest(tmp_path)) == 3


def disk_full(path, *_):
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_no_permission_is_one_message(tmp_path, monkeypatch):
    def denied(self, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    saver = CheckpointSaver(tmp_path)
    saver.save(slices_of(1), {}, {}, step=1)
    with pytest.raises(CheckpointError, match=r"Permission denied: .*there is no checkpoint yet"):
        saver.wait()


def test_leaving_waits_unless_another_rank_may_be_gone(tmp_path, gate, monkeypatch):
    monkeypatch.setattr(background_module, "EXIT_WAIT_S", 0.05)
    with pytest.raises(RuntimeError, match="peer"), CheckpointSaver(tmp_path / "a") as saver:
        saver.save(slices_of(1), {}, {}, step=1)
        raise RuntimeError("lost a peer")
    assert find_latest(tmp_path / "a") is None
    told = []  # a watchdog would take the wait for a hang
    saver = CheckpointSaver(tmp_path / "b", waiting=lambda: told.append(gate.is_set()))
    with pytest.raises(UserError, match="diverged"), saver:
        saver.save(slices_of(1), {}, {}, step=1)
        told.clear()
        threading.Timer(0.05, gate.set).start()
        raise UserError("diverged")
    assert find_latest(tmp_path / "b") is not None
    assert told == [False], "before the wait"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_loss_is_written_when_its_checkpoint_is_complete(tmp_path, gate, asynchronous):
    gate_later = threading.Timer(0.05, gate.set)
    with CheckpointSaver(tmp_path, asynchronous=asynchronous) as saver:
        if not asynchronous:
            gate.set()
        saver.save(slices_of(1), {}, {}, step=1)
        saver.record(Evaluation(1, 2.5, {"a": 2.0, "b": 3.0}))
        if asynchronous:
            assert find_latest(tmp_path) is None, "training did not wait"
            gate_later.start()
        saver.record(Evaluation(2, 2.5))  # no checkpoint of that step
        saver.wait()
        (path,) = tmp_path.iterdir()
        found = read_evaluation(path, parse_manifest(path))
        assert found == Evaluation(1, 2.5, {"a": 2.0, "b": 3.0})


def test_a_loss_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, caplog):
    with CheckpointSaver(tmp_path) as saver:
        saver.save(slices_of(1), {}, {}, step=1)
        saver.wait()
        monkeypatch.setattr(evaluation_module, "write_atomic", lambda *a, **k: disk_full(*a))
        saver.record(Evaluation(1, 2.5))
        saver.wait()
        path = find_latest(tmp_path)
    assert "could not write the validation loss" in caplog.text
    assert read_evaluation(path, parse_manifest(path)) is None


def test_storage_that_does_not_answer_after_a_save_is_a_warning(tmp_path, caplog):
    """The checkpoint is complete, and the trainer hears of it."""
    answers = iter([None, OSError(errno.ESTALE, os.strerror(errno.ESTALE))])

    def fence():
        if error := next(answers):
            raise error

    with CheckpointSaver(tmp_path, fence=fence) as saver:
        saver.save(slices_of(1), {}, {}, step=1)
        saver.wait()
        assert saver.take_finished().path == saver.last_good == find_latest(tmp_path)
    assert "stay until the next save: [Errno 116] Stale file handle" in caplog.text


def test_a_checkpoint_that_lost_a_file_before_its_manifest_does_not_count(tmp_path, monkeypatch):
    real = writer.hash_file

    def clean_up_meanwhile(path):
        (path.parent / "data-00000.safetensors").unlink()
        return real(path)

    monkeypatch.setattr(writer, "hash_file", clean_up_meanwhile)
    saver = CheckpointSaver(tmp_path)
    saver.save(slices_of(1), {}, {}, step=1)
    with pytest.raises(CheckpointError, match="is missing"):
        saver.wait()
    assert find_latest(tmp_path) is None
