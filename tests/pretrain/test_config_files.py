"""Reading and writing run files, and the files that we ship."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pretrain.commands.before_run.check import describe_run
from pretrain.config import ConfigError, check_world, config_from_dict, load_config, save_config
from pretrain.config.changes import Rule, init_changes
from tests.pretrain.run_files import config, raw
from xlstm_mcore.sizes.parameters import count_parameters
from xlstm_mcore.sizes.presets import PRESETS

CONFIGS = Path(__file__).parents[2] / "pretrain" / "configs"


def test_missing_sections_and_keys_are_named():
    values = raw()
    del values["data"], values["run"]["steps"]
    with pytest.raises(ConfigError) as caught:
        config_from_dict(values)
    assert "section data is missing; it needs at least seq_len" in str(caught.value)
    assert "run.steps is missing; set it (optimizer steps in the whole run)" in str(caught.value)


def test_saved_config_reads_back_equal(tmp_path):
    first = config(
        optimizer__betas=[0.8, 0.99], model__gate_soft_cap=None, run__dir="7", optimizer__lr=3e-4
    )
    save_config(first, tmp_path / "new" / "config.yaml")
    assert load_config(tmp_path / "new" / "config.yaml") == first
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "config.yaml"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "does not exist; give the path of a run file"),
        ("", "must hold keys and values"),
        ("- a\n- b\n", "keys such as run:, model:"),
        ("run: {", "not valid YAML"),
        ("run:\n  dir: a\n  dir: b\n", "line 3: dir is given twice"),
        ("run: 5\n", "run=5 must be a section"),
        (b"\xff\xfe\x00", "cannot be read as text"),
    ],
)
def test_unusable_files(tmp_path, text, says):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert says in str(caught.value)
    assert "run.yaml" in str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_validate_and_count_as_the_papers_say(path):
    loaded = load_config(path)
    total = count_parameters(loaded.model)["total"]
    assert f"{total:,}" in describe_run(loaded)
    if path.stem in PRESETS:
        preset = PRESETS[path.stem]
        assert total == preset.parameters
        header = " ".join(
            line.lstrip("# ") for line in path.read_text().split("run:")[0].split("\n")
        )
        assert f"{total:,} parameters" in header
        # Everything that the preset fixes, the file says itself: nothing rests on a default.
        written = yaml.safe_load(path.read_text())["model"]
        for key, value in preset.model.items():
            assert getattr(loaded.model, key) == value, key
            if key in ("norm", "norm_eps", "gate_soft_cap", "logit_soft_cap"):
                assert key in written
    else:
        assert path.stem.startswith("cpu_demo")
        assert 3.5e6 < total < 5e6
        assert check_world(loaded, 2) == 1
        assert check_world(loaded, 4) == 2


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("stages/*.yaml")), ids=lambda path: path.stem)
def test_a_stage_has_the_model_of_the_run_that_it_starts_from(path):
    stage = load_config(path)
    first = load_config(CONFIGS / f"{Path(stage.run.init_from).name}.yaml")
    changes = init_changes(first.model_dump(mode="json"), stage.model_dump(mode="json"))
    assert all(change.rule not in (Rule.FIXED, Rule.ASKED) for change in changes), changes
    assert stage.data.seq_len == 4 * first.data.seq_len and check_world(stage, 64) == 8
    # As many tokens of a row on a GPU as before, so what fitted fits.
    for run in (first, stage):
        assert run.data.seq_len // run.layout.context == 8192
        assert (run.layout.tensor, run.data.micro_batch) == (2, 1)


def test_every_preset_has_a_file():
    assert {p.stem for p in CONFIGS.glob("*.yaml") if not p.stem.startswith("cpu_")} == set(PRESETS)


def test_describe_says_how_processes_are_used():
    text = describe_run(config(layout__tensor=2), 4)
    assert "2 data parallel replicas, 2 micro-batches of 4 rows" in text
    assert "tokens per step   4,096" in text


def test_describe_says_that_nobody_watches():
    assert "watchdog          off" in describe_run(config(guard__hang_timeout=0))
    assert "watchdog" not in describe_run(config())


def test_configuration_needs_no_torch():
    code = (
        "import sys, pretrain.config, pretrain.cli, pretrain.commands.run.launch; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_data_section_that_the_documents_show():
    text = (CONFIGS.parents[1] / "docs/data.md").read_text(encoding="utf-8")
    shown = text.split("## Data of a run")[1].split("```yaml\n")[1].split("```")[0]
    data = config_from_dict({**raw(), **yaml.safe_load(shown)}).data
    assert [s.name for s in data.sources] == ["web", "code", "books"] and data.phases
