"""Keys of earlier versions: in run files, on the command line and in checkpoints."""

from pathlib import Path

import pytest
import yaml

from pretrain.checkpoint.identity import check_same_run
from pretrain.config import ConfigError, load_config, save_config
from pretrain.config.schema import FIELDS
from tests.pretrain.run_files import config, message, raw
from xlstm_io.errors import CheckpointError
from xlstm_mcore import old_keys
from xlstm_mcore.old_keys import OLD_KEYS, update_keys

FIRST = Path(__file__).parents[1] / "data" / "golden" / "0.1.0" / "run" / "config.yaml"
RENAMED = "model.rope_base is read as model.rotary_base, its name since version 0.2.0"


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(old_keys, "_said", set())


def run_file(tmp_path, **changes):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw(**changes)))
    return path


def test_the_table_names_keys_that_are_gone_and_keys_that_there_are():
    for old, entry in OLD_KEYS.items():
        assert old not in FIELDS
        assert entry.new is None or entry.new in FIELDS


def test_the_first_versions_configuration_is_read_with_one_line(caplog, tmp_path):
    loaded = load_config(FIRST)
    assert [record.getMessage() for record in caplog.records] == [RENAMED]
    assert loaded.model.rotary_base == 10_000.0
    save_config(loaded, tmp_path / "config.yaml")
    assert "rope_base" not in (tmp_path / "config.yaml").read_text()
    assert load_config(tmp_path / "config.yaml") == loaded
    load_config(FIRST)
    assert len(caplog.records) == 1, "said once"


def test_only_the_first_process_and_no_launcher_says_it(caplog, monkeypatch):
    load_config(FIRST, quiet=True)
    monkeypatch.setenv("RANK", "1")
    load_config(FIRST)
    assert not caplog.records


@pytest.mark.parametrize(
    ("in_file", "words", "value"),
    [
        ({"model__rope_base": 5.0}, [], 5.0),
        ({}, ["--model.rope_base", "7"], 7.0),
        ({}, ["--model.rope-base=7"], 7.0),
        ({"model__rope_base": 5.0}, ["--model.rotary_base", "7"], 7.0),
        ({"model__rotary_base": 5.0}, ["--model.rope_base", "7"], 7.0),
        ({"engine__tp_comm_overlap": False}, ["--model.rotary_base", "7"], 7.0),
        ({}, ["--engine.tp_comm_overlap", "false", "--model.rotary_base", "7"], 7.0),
        ({}, ["--engine.no-tp-comm-overlap", "--model.rotary_base", "7"], 7.0),
    ],
)
def test_old_keys_of_file_and_command_line_are_read(tmp_path, in_file, words, value):
    assert load_config(run_file(tmp_path, **in_file), words).model.rotary_base == value


def test_what_no_longer_exists_is_an_error_with_a_remedy(tmp_path):
    text = message(engine__tp_comm_overlap=True, run__steps=-1)
    assert "2 problems" in text
    assert "engine.tp_comm_overlap=true was removed in version 0.2.0. It needs" in text
    assert "Take the key out" in text
    with pytest.raises(ConfigError, match="tp_comm_overlap=true was removed"):
        load_config(run_file(tmp_path), ["--engine.tp_comm_overlap"])


def test_an_old_and_a_new_name_in_one_file_contradict_each_other():
    text = message(model__rope_base=5.0, model__rotary_base=6.0)
    assert "model.rope_base is an old name of model.rotary_base, and both are given" in text


def test_reading_changes_nothing_in_the_callers_values():
    before = raw(model__rope_base=5.0)
    update_keys(before)
    assert before == raw(model__rope_base=5.0)


def test_a_checkpoint_of_the_first_version_belongs_to_the_same_run():
    saved = yaml.safe_load(FIRST.read_text())
    now = load_config(FIRST).model_dump(mode="json")
    check_same_run(saved, now)
    check_same_run(saved, {**now, "engine": {**now["engine"], "zero_stage": None}})
    now["model"]["rotary_base"] = 5.0
    with pytest.raises(CheckpointError, match=r"model\.rotary_base: checkpoint 10000.0, run 5.0"):
        check_same_run(saved, now)


def test_a_key_may_move_to_another_section(monkeypatch):
    entry = old_keys.OldKey("optimizer.lr", "9.9", "It moved.")
    monkeypatch.setattr(old_keys, "OLD_KEYS", {"run.lr": entry})
    assert update_keys({"run": {"lr": 2.0, "steps": 1}}).values == {
        "run": {"steps": 1},
        "optimizer": {"lr": 2.0},
    }
    assert config(run__lr=2.0).optimizer.lr == 2.0
