"""A run that starts from the weights of another one, or of an import, on any layout and engine."""

import pytest
import torch
from safetensors.torch import save_file

import pretrain.commands.run.train
from pretrain.checkpoint import CheckpointError, find_latest, read_manifest
from pretrain.config import config_from_dict
from pretrain.watching.history import read_history
from tests.dist.training_runs import tiny_run
from tests.xlstm_mcore.convert.test_import import model_of, random_tensors
from xlstm_io.checkpoint.manifest import is_weight
from xlstm_io.checkpoint.reader import CheckpointReader
from xlstm_mcore.convert import cli as convert
from xlstm_mcore.convert.families import nxai_large

pytestmark = pytest.mark.dist

STILL = {"optimizer__lr": 1e-30, "optimizer__weight_decay": 0.0, "schedule__warmup_steps": 0}


def train(raw):
    """Exit code, or the message of the error."""
    try:
        return pretrain.commands.run.train.main(config_from_dict(raw))
    except CheckpointError as error:
        return str(error)


def tensors(folder, *, weights=True):
    with CheckpointReader(find_latest(folder)) as reader:
        return {n: reader.read(n) for n in reader.manifest.tensors if is_weight(n) == weights}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def first(pool, shards, tmp_path_factory):
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("first")
    assert pool(2, train, tiny_run(folder, shards, run__steps=4)) == [0, 0]
    return folder


def test_a_run_starts_from_the_weights_of_another(pool, shards, first, tmp_path):
    raw = tiny_run(tmp_path, shards, run__steps=1, run__seed=9, run__init_from=str(first), **STILL)
    raw["layout"] = {"tensor": 2}
    assert pool(2, train, raw) == [0, 0]
    same(tensors(tmp_path), tensors(first))
    assert read_manifest(find_latest(tmp_path)).state["updates"] == 1
    start, _done = read_history(tmp_path)
    assert start["step"] == 0 and "without its optimizer state" in start["notes"][0]
    moments = {n: t for n, t in tensors(tmp_path, weights=False).items() if "exp_avg." in n}
    # From zero, one step makes 0.1 of the gradient, which is clipped to a norm of 1.
    assert sum(t.square().sum().item() for t in moments.values()) ** 0.5 < 0.11
    # The same command again continues: the weights of the other run are not asked for.
    raw["run"] |= {"steps": 2, "init_from": str(tmp_path / "gone")}
    assert pool(2, train, raw) == [0, 0]
    assert find_latest(tmp_path).name.startswith("step-00000002")


def test_the_optimizer_state_is_taken_along_when_asked(pool, shards, first, tmp_path):
    raw = tiny_run(tmp_path, shards, run__steps=1, run__init_from=str(first), **STILL)
    raw["run"]["init_optimizer"] = True
    assert pool(1, train, raw) == [0]
    before = read_manifest(find_latest(first)).state["updates"]
    assert read_manifest(find_latest(tmp_path)).state["updates"] == before + 1
    now, then = (tensors(folder, weights=False) for folder in (tmp_path, first))
    name = "optimizer.state.exp_avg_sq.embedding.word_embeddings.weight"
    assert (now[name] >= 0.949 * then[name]).all() and then[name].max() > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_master_weights_are_taken_and_not_the_bf16_ones(pool, shards, tmp_path, ranks):
    narrow, wide = tmp_path / "narrow", tmp_path / "wide"
    assert pool(1, train, tiny_run(narrow, shards, run__steps=2, engine__precision="bf16")) == [0]
    raw = tiny_run(wide, shards, run__steps=1, run__init_from=str(narrow), **STILL)
    assert pool(ranks, train, raw) == [0] * ranks
    now, then = (
        {n: t for n, t in tensors(folder, weights=False).items() if ".param." in n}
        for folder in (wide, narrow)
    )
    assert any(not torch.equal(t, t.bfloat16().float()) for t in then.values())
    same(now, then)


@pytest.mark.parametrize(
    "changes",
    [
        {"layout__tensor": 2},
        {"layout__pipeline": 2, "model__pattern": "M|M"},
        {"engine__name": "deepspeed", "engine__zero_stage": 2},
        {"engine__name": "deepspeed", "engine__zero_stage": 3},
        {"optimizer__name": "muon"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_an_import_is_continued_on_every_layout_and_engine(pool, shards, tmp_path, changes):
    model = model_of("MM", 32, 2, vocab_size=384)
    ours, theirs = random_tensors(nxai_large.table({}), model)
    save_file(theirs, tmp_path / "peer.safetensors")
    imported = tmp_path / "imported"
    assert convert.main(["from-nxai", str(tmp_path / "peer.safetensors"), str(imported)]) == 0
    same(tensors(imported), ours)
    raw = tiny_run(tmp_path / "run", shards, run__steps=1, run__init_from=str(imported), **STILL)
    raw["model"]["pattern"] = "MM"
    for key, value in changes.items():
        section, name = key.split("__")
        raw.setdefault(section, {})[name] = value
    assert pool(2, train, raw) == [0, 0]
    same(tensors(tmp_path / "run"), ours)


def test_other_models_and_imports_in_place_of_a_run_are_one_message(pool, shards, first, tmp_path):
    raw = tiny_run(tmp_path / "run", shards, run__steps=4, run__init_from=str(first))
    raw["model"] |= {"num_heads": 4, "vocab_size": 400}
    (text,) = pool(1, train, raw)
    for words in (
        "model.num_heads: checkpoint 2, run 4",
        "model.vocab_size: checkpoint 384, run 400",
        "the first 330 rows are the same tokens, and 330 in all",
        "take the model section and the tokenizer of the checkpoint",
    ):
        assert words in text, text
    raw = tiny_run(tmp_path / "run", shards, run__steps=4, run__init_from=str(tmp_path / "gone"))
    (text,) = pool(1, train, raw)
    assert "gone: no such folder" in text
    model = model_of("M", 32, 2, vocab_size=384)
    _, theirs = random_tensors(nxai_large.table({}), model)
    save_file(theirs, tmp_path / "peer.safetensors")
    imported = tmp_path / "imported"
    assert convert.main(["from-nxai", str(tmp_path / "peer.safetensors"), str(imported)]) == 0
    (text,) = pool(1, train, tiny_run(imported, shards, run__steps=4))
    assert "is an import, from which a run starts and does not continue" in text
    assert f"set run.init_from={imported}" in text
    raw = tiny_run(tmp_path / "run", shards, run__steps=4, run__init_from=str(imported))
    (text,) = pool(1, train, raw | {"run": raw["run"] | {"init_optimizer": True}})
    assert "has no optimizer state; set it to false" in text
