"""Values that no writer of ours writes, in files whose hashes are right: read, or one message.

By command with more of them: `python -m pytest tests/attack --attacks 60`.
"""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.build.build import build
from data_prep.config import BuildConfig
from data_prep.tools.inspect_shards import describe, show_row
from data_prep.tools.merge import merge
from data_prep.tools.repack import repack
from data_prep.tools.verify import verify
from pretrain.data import TokenDataset
from tests.attack import values
from tests.attack.children import CRASHED, READ, attempt
from tests.data_prep.small_corpus import make_texts, run, write_jsonl
from xlstm_io.errors import UserError


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("attacked")
    corpus = write_jsonl(folder / "corpus.jsonl", make_texts(40))
    assert run("tokenizer", "--input", corpus, "--vocab-size", 330, "--out", folder / "tok") == 0
    keys = {"input": [str(corpus)], "tokenizer": str(folder / "tok"), "out": str(folder / "out")}
    return {**keys, "seq_len": 16, "valid_fraction": 0.2, "shard_mb": 0.003, "workers": 1}


@pytest.fixture(scope="module")
def shards(settings) -> Path:
    build(BuildConfig.model_validate(settings))
    return Path(settings["out"])


def use(folder: Path) -> None:
    """Everything that reads a folder of shards; what one of them refuses is raised at the end."""
    refused = []

    def rows() -> None:
        data = TokenDataset(folder, seq_len=16)
        read = data.read(np.arange(data.num_rows))
        read.masks()
        assert int(read.tokens.max()) < data.manifest.vocab_size

    readers = (
        *(lambda: verify(folder, full=True), rows, lambda: describe(folder)),
        *(lambda: show_row(folder, 0), lambda: repack(folder, 8, folder / "new", workers=1)),
    )
    for read in readers:
        try:
            read()
        except UserError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def go_on(settings: dict):
    """The commands that go on from a build state."""

    def act(folder: Path) -> None:
        refused = []
        config = BuildConfig.model_validate({**settings, "out": str(folder)})
        for command in (lambda: merge(folder, []), lambda: build(config)):
            try:
                command()
            except UserError as error:
                refused.append(error)
        if refused:
            raise refused[0]

    return act


CHANGES = {
    "manifest": values.change_manifest,
    "index": values.change_index,
    "rows": values.change_rows,
    "build.json": values.change_note("build.json"),
    "plan": values.change_note("plan/*.json"),
    "scan": values.change_note("scan/*.json"),
    "record": values.change_note("done/*.json"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_hostile_values_are_used_or_refused(name, shards, settings, tmp_path, pytestconfig):
    act = use if name in ("manifest", "index", "rows") else go_on(settings)
    faults = []
    for number in range(max(2, pytestconfig.getoption("--attacks") // 3)):
        folder = shutil.copytree(shards, tmp_path / "copy")
        CHANGES[name](folder, random.Random(f"{name} {number}"))
        outcome = attempt(lambda folder=folder: act(folder))
        if outcome.kind == CRASHED:
            faults.append(f"number {number}: {outcome.message}")
        if sorted(tmp_path.iterdir()) != [folder]:
            faults.append(f"number {number}: wrote outside of its folder")
        shutil.rmtree(folder)
    assert not faults, "\n".join(faults)


def test_the_attack_finds_a_check_that_is_gone(shards, tmp_path, monkeypatch):
    """Without the look at the numbers of a block, an id beyond the vocabulary reaches training."""
    monkeypatch.setattr("xlstm_io.shards.shard.block_problem", lambda *a, **k: "")
    found = 0
    for number in range(12):
        folder = shutil.copytree(shards, tmp_path / "copy")
        values.change_rows(folder, random.Random(f"rows {number}"))
        found += attempt(lambda folder=folder: use(folder)).kind == CRASHED
        shutil.rmtree(folder)
    assert found


def test_a_sound_folder_is_read(shards, settings, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "copy")
    assert attempt(lambda: use(folder)).kind == READ
    (folder / "manifest.json").unlink()
    assert attempt(lambda: go_on(settings)(folder)).kind == READ
