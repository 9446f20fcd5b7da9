"""Runs of earlier versions: what tests/data/golden holds is read, and goes on as it did then."""

import json
import shutil
from pathlib import Path

import pytest

import data_prep.cli
from pretrain import layout
from pretrain.checkpoint import find_latest, load_checkpoint
from pretrain.config import load_config
from pretrain.engines import make_engine
from tests.data.golden.make import SAVED, STEPS, hashes_of, make, stored_hashes, train

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if path.name[0].isdigit())


@pytest.fixture(params=VERSIONS)
def golden(request):
    """The folder of a version; nothing may be written there."""
    return GOLDEN / request.param


def read(path):
    return json.loads(path.read_text())


def test_the_first_version_is_there():
    assert "0.1.0" in VERSIONS


def test_its_shards_are_sound(golden, capsys):
    assert data_prep.cli.main(["verify", str(golden / "shards"), "--full"]) == 0


def test_its_tensors_are_read_bit_for_bit(golden):
    assert stored_hashes(find_latest(golden / "run")) == read(golden / "hashes.json")


def test_an_engine_loads_its_tensors_bit_for_bit(golden, monkeypatch):
    monkeypatch.chdir(golden)  # its configuration, with every key that there was
    config = load_config("run/config.yaml")
    layout.leave()
    try:
        engine = make_engine(config, layout.start(config))
        path = find_latest("run")
        engine.load_sharded_state(lambda slices: load_checkpoint(path, slices), SAVED)
        assert hashes_of(engine.sharded_state()) == read(golden / "hashes.json")
    finally:
        layout.leave()


def test_its_run_goes_on_with_the_same_losses(golden, tmp_path):
    folder = shutil.copytree(golden, tmp_path / "run")
    expected = {int(step): loss for step, loss in read(golden / "losses.json").items()}
    losses = train(folder)
    assert list(losses) == [4, 5, 6]
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], abs=2e-6), step


def test_the_next_version_is_made_by_a_command(tmp_path):
    """And the version at hand continues its own, to the last digit."""
    made = tmp_path / "made"
    make(made)
    files = {path.relative_to(made).parts[0] for path in made.rglob("*") if path.is_file()}
    assert files == {"hashes.json", "losses.json", "run", "run.yaml", "shards"}
    expected = read(made / "losses.json")
    assert len(expected) == STEPS
    assert train(made) == {step: expected[str(step)] for step in range(SAVED + 1, STEPS + 1)}
