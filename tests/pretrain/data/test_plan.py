"""The whole order: sources, mixture, shuffles and phases; what may change under a checkpoint."""

import errno
import json
import os
import resource
import shutil

import numpy as np
import pytest
import torch

from benchmarks.loader.synthetic_shards import write_shards
from pretrain.config import DataConfig
from pretrain.config.ramp import BatchRamp
from pretrain.data import (
    DataError,
    DataPlan,
    Phase,
    TokenDataset,
    TrainLoader,
    open_plan,
    open_valid,
)
from pretrain.data.blend import CYCLE
from pretrain.data.plan import CACHE_VARIABLE, COPIES_VARIABLE
from xlstm_io.errors import ShardFormatError
from xlstm_io.shards.index import CorruptShardError

SOURCES = [
    {"name": "web", "path": "big", "source": "web", "weight": 0.7},
    {"name": "code", "path": "big", "source": "code", "weight": 0.3},
    {"name": "books", "path": "small"},
]
PHASES = [{"from_sample": 3000, "weights": {"web": 1, "books": 1}}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    write_shards(root / "big", {"web": [90, 70, 40], "code": [30, 55]}, seq_len=8, valid_rows=5)
    write_shards(root / "small", {"books": [64]}, seq_len=8, seed=1)
    return root


def data(folders, **changes) -> DataConfig:
    """A data section; paths are relative to the folder of the fixture."""
    values = dict(sources=SOURCES, phases=PHASES, seq_len=8, global_batch=8, micro_batch=2)
    values |= changes

    def at(item):
        return dict(item, path=str(folders / item["path"]))

    for key in ("sources", "valid"):
        values[key] = [at(item) for item in values.get(key, [])]
    if "path" in values:
        values["path"] = str(folders / values["path"])
    return DataConfig(**values)


@pytest.mark.parametrize("shuffle", ["row", "window"])
def test_every_epoch_of_every_source_holds_each_row_once(folders, shuffle):
    plan = open_plan(data(folders, shuffle=shuffle, window_shards=2), seed=5)
    which, rows = plan.locate(np.arange(5000))
    assert plan.names == ["books", "code", "web"]
    for number, dataset in enumerate(plan.datasets):
        mine = rows[which == number]
        size = dataset.num_rows
        assert len(mine) > 2 * size
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(size))
        rest = mine[len(mine) // size * size :]
        assert len(set(rest.tolist())) == len(rest)
        assert plan.epochs(5000)[plan.names[number]] == len(mine) / size


def test_the_order_of_a_mixture_is_pinned(folders):
    """A description does not change with the code: a resume would repeat and skip rows unseen."""
    which, rows = open_plan(data(folders), seed=5).locate(np.array([*range(6), *range(2998, 3004)]))
    assert which.tolist() == [2, 2, 2, 2, 2, 1, 2, 2, 2, 0, 0, 2]
    assert rows.tolist() == [34, 36, 164, 6, 191, 50, 28, 83, 9, 3, 19, 141]


def test_every_row_of_a_step_knows_its_source(folders):
    mixture = open_plan(data(folders), seed=5)
    folder = open_plan(data(folders, sources=[], phases=[], path="big"), seed=5)
    one = open_plan(data(folders, sources=[], phases=[], path="small"), seed=5)
    assert mixture.source_names == ["books", "code", "web"]
    assert folder.source_names == ["web", "code"], "in row order"
    assert one.source_names == []
    for plan in (mixture, folder, one):
        which, rows = plan.locate(np.arange(16))
        found = plan.sources_of(which, rows)
        if plan is mixture:
            assert (found == which).all()
        else:  # the source web has the first 200 rows of its folder
            assert (found == (rows >= 200)).all()
        with TrainLoader(plan, BatchRamp(8), micro_batch=2) as loader:
            step = [batch.sources for batch in next(loader)]
        names = len(plan.source_names)
        assert [part.shape for part in step] == [(2, names)] * 4
        if names:
            assert torch.cat(step).argmax(1).tolist() == found[:8].tolist()
            assert (torch.cat(step).sum(1) == 1).all()


def test_shares_follow_the_phases(folders):
    plan = open_plan(data(folders, phases=[{"from_sample": CYCLE, "weights": {"books": 1}}]), 0)
    which, _ = plan.locate(np.arange(CYCLE + 500))
    assert np.bincount(which[:CYCLE], minlength=3).tolist() == [0, 3000, 7000]
    assert set(which[CYCLE:].tolist()) == {0}


def test_the_order_of_the_list_and_the_scale_of_the_weights_do_not_matter(folders):
    other = [dict(s, weight=s["weight"] * 10) if "weight" in s else s for s in SOURCES[::-1]]
    plans = [open_plan(data(folders, sources=s), seed=5) for s in (SOURCES, other)]
    found = [np.array(plan.locate(np.arange(4000))) for plan in plans]
    assert (found[0] == found[1]).all()
    assert plans[0].describe(4000) == plans[1].describe(4000)


def test_a_single_path_is_a_mixture_of_one(folders):
    plan = open_plan(data(folders, sources=[], phases=[], path="big"), seed=3)
    assert plan.num_rows == 200 + 85
    alone = DataPlan.of(TokenDataset(folders / "big", seq_len=8), seed=3)
    assert (plan.locate(np.arange(600))[1] == alone.locate(np.arange(600))[1]).all()
    assert plan.describe(9) == alone.describe(9)


def test_a_description_covers_the_past_and_nothing_else(folders):
    """Two plans that describe themselves equally agree on every sample before; others differ."""
    now = open_plan(data(folders), seed=5)
    without = open_plan(data(folders, sources=SOURCES[:2], phases=[]), seed=5)
    assert now.describe(3000) == without.describe(3000) != now.describe(3001)
    for a, b in zip(now.locate(np.arange(3000)), without.locate(np.arange(3000)), strict=True):
        name = [np.array(p.names, object) for p in (now, without)]
        assert (name[0][a] == name[1][b]).all() if a.max() < 3 and len(name[1]) > a.max() else True
    assert (now.locate(np.arange(3000))[1] == without.locate(np.arange(3000))[1]).all()
    text = str(now.describe(3001))
    for change in (
        dict(seed=6),
        dict(shuffle="window"),
        dict(phases=[dict(PHASES[0], from_sample=2999)]),
        dict(sources=[dict(SOURCES[0], weight=0.6), *SOURCES[1:]]),
        dict(sources=[dict(SOURCES[0], name="net"), *SOURCES[1:]], phases=[]),
    ):
        seed = change.pop("seed", 5)
        if not change.get("phases", PHASES):
            change["sources"] = change["sources"][:2]
        assert str(open_plan(data(folders, **change), seed).describe(3001)) != text
    two, three = (
        open_plan(data(folders, shuffle="window", window_shards=n), 5).describe(1) for n in (2, 3)
    )
    assert two != three


def test_sources_of_different_tokenizers_are_refused(folders):
    write_shards(folders / "other", {"x": [20]}, seq_len=8, tokenizer="another", valid_rows=2)
    write_shards(folders / "wide", {"x": [20]}, seq_len=8, vocab_size=70_000)
    write_shards(folders / "long", {"x": [20]}, seq_len=16)
    more = [{"name": n, "path": n, "weight": 1} for n in ("other", "wide")]
    with pytest.raises(DataError) as caught:
        open_plan(data(folders, sources=[*SOURCES, *more]), seed=0)
    for part in (
        "small has tokenizer.sha256=",
        "other has ",
        "has dtype=uint16, ",
        "wide has uint32",
    ):
        assert part in str(caught.value)
    more = [{"name": "long", "path": "long", "weight": 1}, {"name": "no", "path": "no"}]
    with pytest.raises(DataError) as caught:
        open_plan(data(folders, sources=[*SOURCES, *more], phases=[]), seed=0)
    with pytest.raises(DataError, match=r"one tokenizer.*\n.*small has .*other has "):
        valid = [{"name": "v", "path": "other"}]
        open_valid(data(folders, valid=valid), open_plan(data(folders, sources=SOURCES), 0))
    for part in ("source 'long': data.seq_len=8 is not the seq_len=16", "source 'no':"):
        assert part in str(caught.value)


def test_validation_sets_are_those_named_or_of_every_source(folders):
    found = open_valid(data(folders))
    assert {name: d.num_rows for name, d in found.items()} == {"web": 5, "code": 5}
    found = open_valid(data(folders, sources=[], phases=[], path="big"))
    assert {name: d.num_rows for name, d in found.items()} == {"": 10}
    found = open_valid(data(folders, valid=[{"name": "c", "path": "big", "source": "code"}]))
    assert {name: d.num_rows for name, d in found.items()} == {"c": 5}
    with pytest.raises(DataError, match=r"'b'.* has no 'valid' rows"):
        open_valid(data(folders, valid=[{"name": "b", "path": "small"}]))
    with pytest.raises(DataError, match="no source has validation rows"):
        open_valid(data(folders, sources=[], phases=[], path="small"))


def test_copies_on_the_nodes_disk_are_read_and_what_is_said_names_the_originals(
    folders, tmp_path, monkeypatch
):
    """The paths of the run file go into checkpoints, and a scratch folder ends with its job."""
    section, rows = data(folders), np.arange(50)
    plan = open_plan(section, 5)
    wanted = plan.read(*plan.locate(rows)).tokens
    moved = {}
    for name in ("big", "small"):
        shutil.copytree(folders / name, tmp_path / "own disk" / name)
        moved[str(folders / name)] = str(tmp_path / "own disk" / name)
    there = {name: str(tmp_path / "gone" / name) for name in ("big", "small")}
    gone = data(tmp_path / "gone", valid=[{"name": "v", "path": "big"}])
    copies = {there[name]: moved[str(folders / name)] for name in there}
    monkeypatch.setenv(COPIES_VARIABLE, json.dumps(copies))
    plan = open_plan(gone, 5)
    assert (plan.read(*plan.locate(rows)).tokens == wanted).all()
    assert str(plan.manifest.root) == there["small"]
    assert str(plan.manifest.tokenizer_path).startswith(there["small"])
    assert plan.describe(3001) == open_plan(section, 5).describe(3001)
    (valid,) = open_valid(gone, plan).values()
    assert valid.read(np.arange(5)).tokens.any() and str(valid.manifest.root) == there["big"]
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    remote = data(folders, sources=[], phases=[]).model_copy(
        update={"path": f"file://{folders}/small", "cache_dir": "/proc/nowhere"}
    )
    open_plan(remote, 5)
    assert list((tmp_path / "cache").rglob("manifest.json"))


def test_summary_says_shares_epochs_and_files(folders):
    text = open_plan(data(folders, shuffle="window", window_shards=2), 0).summary(2000)
    assert "web 70.00% of 200 rows, epoch 7.0" in text and "books 0.00% of 64 rows" in text
    assert "rows of 2 shards mixed at a time, at most 6 files open in each process" in text


def test_phase_weights_may_name_a_source_once(folders):
    plan = DataPlan({"x": TokenDataset(folders / "small", seq_len=8)}, [Phase(0, {"x": 2})], seed=0)
    assert plan.epochs(64) == {"x": 1.0}


def test_connections_to_other_ranks_take_descriptors_too(folders, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (12, 12))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 9)
    plan = DataPlan.of(TokenDataset(folders / "big", seq_len=8), seed=1)
    assert [dataset.max_open for dataset in plan.datasets] == [2]


def test_many_sources_share_the_descriptors_of_a_process(folders, monkeypatch):
    """A file that cannot be opened for want of a descriptor is not damaged, nor quarantined."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (12, 12))
    options = dict(seq_len=8, quarantine=True)
    sources = {name: TokenDataset(folders / "big", **options) for name in "abc"}
    plan = DataPlan(sources, [Phase(0, dict.fromkeys("abc", 1.0))], seed=1)
    assert not plan.read(*plan.locate(np.arange(600))).damaged
    assert sum(dataset.open_files for dataset in plan.datasets) == 6
    assert "at most 6 files" in plan.summary(0)

    def no_descriptor(path, *arguments, **options):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    sources["a"].close()
    monkeypatch.setattr("xlstm_io.storage.os.open", no_descriptor)
    with pytest.raises(ShardFormatError, match=r"too many files open.*ulimit") as caught:
        sources["a"].read(np.arange(3))
    assert not isinstance(caught.value, CorruptShardError)
