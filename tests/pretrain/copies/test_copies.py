"""`copy`, `prune` and `average`: what they write is what was asked for, and is read back."""

import json

import pytest
import torch

from pretrain import cli
from pretrain.checkpoint import TensorSlice, read_manifest, save_checkpoint
from pretrain.copies import copying
from tests import fake_object_store
from xlstm_io.checkpoint.evaluation import Evaluation, read_evaluation, write_evaluation
from xlstm_io.checkpoint.manifest import is_weight
from xlstm_io.checkpoint.reader import CheckpointReader
from xlstm_io.storage import location

SHAPES = {"a.weight": (6, 4), "b.weight": (5,)}


def save(root, step, **changes):
    """A checkpoint of bf16 weights with fp32 masters, whose values depend on the step."""
    rng = torch.Generator().manual_seed(step)
    slices = []
    for name, shape in SHAPES.items():
        master = torch.randn(shape, generator=rng)
        tensors = {
            name: master.bfloat16(),
            f"optimizer.state.param.{name}": master,
            f"optimizer.state.exp_avg.{name}": torch.randn(shape, generator=rng),
        }
        slices += [TensorSlice(n, shape, (0,) * len(shape), t) for n, t in tensors.items()]
    state = {"tokenizer": {"sha256": "x"}, "updates": step} | changes
    files = {"tokenizer.json": b"{}"}
    return save_checkpoint(root, slices, state, {"model": {}}, step=step, files=files)


@pytest.fixture
def run(tmp_path):
    paths = [save(tmp_path / "run", step) for step in (2, 4, 6)]
    write_evaluation(paths[1], Evaluation(4, 1.5, {"": 1.5}))
    return str(tmp_path / "run"), paths


def read_all(path):
    with CheckpointReader(path) as reader:
        return {name: reader.read(name) for name in reader.manifest.tensors}


def only(root):
    (path,) = (location(root) / "checkpoints").iterdir()
    return path


def test_a_copy_is_the_same_byte_for_byte(run, tmp_path, capsys):
    folder, paths = run
    assert cli.run(["copy", folder, str(tmp_path / "out"), "--checkpoint", "4"]) == 0
    copy = only(tmp_path / "out")
    assert copy.name == paths[1].name and str(copy) in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {
        p.name: p.read_bytes() for p in paths[1].iterdir()
    }
    assert read_evaluation(copy, read_manifest(copy)).loss == 1.5
    assert cli.run(["copy", folder, str(tmp_path / "out"), "--checkpoint", "4"]) == 2
    assert "holds this checkpoint already" in capsys.readouterr().err


def test_a_copy_goes_to_a_url_and_on_after_a_cut(run, tmp_path, monkeypatch, capsys):
    fake_object_store.register()
    folder, paths = run
    url = f"objects://{tmp_path}/bucket/run"

    def cut(source, target, sizes):
        (name, *_) = sizes
        with copying.writing(target / name) as file:
            file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(copying, "_copy_files", cut)
        assert cli.run(["copy", folder, url]) == 130
    assert cli.run(["copy", folder, url]) == 0
    assert cli.run(["copy", url, str(tmp_path / "back")]) == 0
    for name, tensor in read_all(only(tmp_path / "back")).items():
        assert torch.equal(tensor, read_all(paths[-1])[name])


def test_what_arrives_damaged_is_named_and_removed(run, tmp_path, monkeypatch, capsys):
    folder, _ = run
    original = copying._copy_files

    def damage(source, target, sizes):
        original(source, target, sizes)
        file = next(p for p in target.iterdir() if p.suffix == ".safetensors")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(copying, "_copy_files", damage)
    assert cli.run(["copy", folder, str(tmp_path / "out")]) == 2
    assert "does not match its hash" in capsys.readouterr().err
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


def test_a_pruned_checkpoint_has_the_weights_and_nothing_else(run, tmp_path, capsys):
    folder, paths = run
    assert cli.run(["prune", folder, str(tmp_path / "out")]) == 0
    pruned = only(tmp_path / "out")
    before, after = read_all(paths[-1]), read_all(pruned)
    assert after.keys() == {name for name in before if is_weight(name)} == SHAPES.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    manifest = read_manifest(pruned)
    assert manifest.step == 6 and manifest.state["pruned_from"] == str(paths[-1])
    assert (pruned / "tokenizer.json").read_bytes() == b"{}"
    assert manifest.state["tokenizer"] == {"sha256": "x"}
    assert cli.run(["prune", folder, str(tmp_path / "out")]) == 2
    assert "holds a checkpoint already" in capsys.readouterr().err


def test_an_average_is_that_of_the_last_master_weights(run, capsys):
    folder, paths = run
    assert cli.run(["average", folder, "--last", "2"]) == 0
    mean = only(f"{folder}/average-last-2")
    assert str(mean) in capsys.readouterr().out
    parts = [read_all(path) for path in paths[1:]]
    for name, value in read_all(mean).items():
        true = sum(part[f"optimizer.state.param.{name}"].double() for part in parts) / 2
        assert value.dtype == torch.float32 and torch.equal(value, true.float())
    state = read_manifest(mean).state
    assert state["averaged"] == [str(paths[2]), str(paths[1])]
    assert json.dumps(state["tokenizer"]) == '{"sha256": "x"}'


def test_an_average_of_too_few_is_refused(run, capsys):
    folder, _ = run
    assert cli.run(["average", folder, "--last", "4"]) == 2
    assert "has 3 complete checkpoints, not 4" in capsys.readouterr().err
    assert cli.run(["average", folder, "--last", "1"]) == 2
    assert "use 2 or more" in capsys.readouterr().err
