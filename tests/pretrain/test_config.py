"""Run files: validation, messages, overrides, round trip, and the files that we ship."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pretrain.commands.check import describe_run
from pretrain.config import (
    ConfigError,
    RunConfig,
    check_world,
    config_from_dict,
    load_config,
    override_option,
    save_config,
    split_overrides,
)
from xlstm_mcore.sizes.parameters import count_parameters
from xlstm_mcore.sizes.presets import PRESETS

CONFIGS = Path(__file__).parents[2] / "pretrain" / "configs"


def raw(**changes):
    """A valid config as nested dicts; `model__num_heads=3` changes one key, None deletes it."""
    values = {
        "run": {"dir": "runs/x", "steps": 100},
        "model": {"pattern": "MMMM", "hidden_size": 128, "num_heads": 4, "vocab_size": 8192},
        "data": {"path": "data", "seq_len": 256, "global_batch": 16, "micro_batch": 4},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return values


def message(**changes):
    with pytest.raises(ConfigError) as caught:
        config_from_dict(raw(**changes))
    return str(caught.value)


def config(**changes) -> RunConfig:
    return config_from_dict(raw(**changes))


def test_defaults_are_the_7b_style_recipe():
    model = config().model
    assert (model.norm, model.norm_eps, model.gate_soft_cap) == ("rmsnorm", 1e-6, 15.0)
    assert (model.logit_soft_cap, model.igate_bias_init) == (30.0, -10.0)


def test_every_problem_is_in_one_message():
    text = message(
        run__steps="many",
        run__step=3,
        model__num_heads=8,
        model__vocab_size=8191,
        layout__tensor=3,
        data__micro_batch=5,
        engine__zero_stage=2,
        optimizer__lr=-1,
    )
    for part in (
        "7 problems",
        "run.steps='many' must be a valid integer",
        "run.step is no key of a run file; did you mean run.steps?",
        "layout.tensor=3 does not divide model.num_heads=8; use 1, 2, 4 or 8",
        "layout.tensor=3 does not divide model.vocab_size=8191; use model.vocab_size=8193",
        "data.micro_batch=5 does not divide data.global_batch=16; use 1, 2, 4, 8 or 16",
        "engine.zero_stage=2: Megatron's distributed optimizer shares out",
        "optimizer.lr=-1 must be greater than 0",
    ):
        assert part in text


def test_a_broken_field_does_not_hide_rules_between_others():
    text = message(model__hidden_size="wide", model__num_heads=4, layout__tensor=3)
    assert "model.hidden_size='wide'" in text
    assert "layout.tensor=3 does not divide model.num_heads=4" in text
    assert "hidden_size = " not in text, "a rule ran on a value that is not there"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer__lerning_rate": 1}, "the keys of optimizer are name, lr"),
        ({"model__hiden_size": 1}, "did you mean model.hidden_size?"),
        ({"data__lr": 1}, "did you mean optimizer.lr?"),
        ({"optimiser__lr": 1}, "did you mean optimizer?"),
        ({"model__tie": True}, "did you mean model.tie_embeddings?"),
    ],
)
def test_misspelt_keys_get_a_suggestion(changes, says):
    assert says in message(**changes)


def test_missing_sections_and_keys_are_named():
    values = raw()
    del values["data"], values["run"]["steps"]
    with pytest.raises(ConfigError) as caught:
        config_from_dict(values)
    assert "section data is missing; it needs at least seq_len" in str(caught.value)
    assert "run.steps is missing; set it (optimizer steps in the whole run)" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__pattern": "MM#M"}, "'#' at position 2, which is no block"),
        (
            {"model__pattern": "M*", "model__attention_heads": 3},
            "model.attention_heads=3 does not cut model.hidden_size=128 into heads of an even",
        ),
        (
            {"model__pattern": "M*", "model__attention_heads": 128},
            "use 1, 2, 4, 8, 16, 32 or 64, or set model.attention_heads",
        ),
        (
            {"model__pattern": "M*", "model__attention_kv_heads": 3},
            "model.attention_kv_heads=3 does not divide the 4 heads of * (model.num_heads)",
        ),
        (
            {"model__pattern": "M*", "model__attention_kv_heads": 2, "layout__tensor": 4},
            "layout.context=1 does not divide model.attention_kv_heads=2, the heads of k and v",
        ),
        ({"model__pattern": "MM|MM"}, "has 2 stages, but layout.pipeline=1"),
        ({"layout__pipeline": 2}, "write 1 cuts (|) into the pattern"),
        ({"layout__virtual": 2, "model__pattern": "MM|MM"}, "layout.pipeline=1 has none"),
        ({"model__pattern": "m", "model__num_heads": 3}, "model.num_heads=3 does not divide"),
        ({"model__pattern": "s", "model__num_heads": 3}, "divide model.hidden_size = 128; use 1,"),
        ({"model__qk_dim_factor": 0.001}, "rounds to 0"),
        ({"layout__sequence": True}, "set layout.sequence=false"),
        (
            {"layout__sequence": True, "layout__tensor": 4, "data__seq_len": 254},
            "data.seq_len=254 does not split into 4 parts",
        ),
        ({"layout__context": 3}, "data.seq_len=256 does not split into 3 parts"),
        (
            {"layout__context": 2, "layout__tensor": 4, "layout__sequence": True}
            | {"data__seq_len": 252},
            "data.seq_len=252 does not split into 8 parts",
        ),
        (
            {"model__pattern": "m", "data__seq_len": 16, "layout__context": 8},
            "leaves 2 tokens of data.seq_len=16 to a process, but the convolution of m looks back "
            "model.conv_width - 1 = 3 tokens, into one process at most; use layout.context=1, 2 "
            "or 4",
        ),
        (
            {"model__pattern": "Ms", "layout__context": 8},
            "cannot be cut; use layout.context=1, 2 or 4",
        ),
        (
            {"model__pattern": "Ms", "layout__context": 4, "layout__tensor": 2},
            "cannot be cut; use layout.context=1 or 2",
        ),
        ({"model__kernel_backend": "numba"}, "model.kernel_backend"),
        ({"engine__zero_stage": 0}, "the nearest combination that works has engine.zero_stage=1"),
        ({"engine__zero_stage": 2}, "nearest combination that works has engine.name=deepspeed"),
        (
            {"engine__precision": "fp8"},
            "the nearest combination that works has engine.precision=bf16",
        ),
        (
            {"optimizer__name": "muon", "engine__zero_stage": 1},
            "optimizer.name=muon, engine.zero_stage=1: Muon orthogonalises whole matrices",
        ),
        ({"engine__offload": "optimizer"}, "works has engine.name=deepspeed"),
        (
            {
                "engine__name": "deepspeed",
                "engine__zero_stage": 3,
                "layout__pipeline": 2,
                "model__pattern": "MM|MM",
            },
            "engine.name=deepspeed, engine.zero_stage=3, layout.pipeline=2 or more: DeepSpeed",
        ),
        ({"optimizer__decay": {"norms": True}}, "optimizer.decay"),
        ({"schedule__name": "wsd"}, "example, 10 (a tenth of run.steps)"),
        (
            {"schedule__cooldown_shape": "exponential", "schedule__cooldown_steps": 5},
            "cooldown_min_lr_ratio=0 is never reached",
        ),
        ({"engine__zero_stage": 4}, "engine.zero_stage=4 must be less than or equal to 3"),
        ({"schedule__warmup_steps": 101}, "do not fit into run.steps=100"),
        ({"schedule__name": "exponential", "schedule__min_lr_ratio": 0.0}, "is never reached"),
        ({"model__pattern": "m", "model__qkv_block_size": 48}, "model.qkv_block_size=48 times"),
        (
            {"layout__tensor": 4, "model__round_up_to": 2, "model__ffn_dim_factor": 1.01},
            "set model.round_up_to to a multiple of 4",
        ),
        ({"memory__recompute_full_blocks": "Ms"}, "names 's', which model.pattern has not; use"),
        ({"model__head_norm": "batchnorm"}, "'layernorm', 'rmsnorm' or 'none'"),
        ({"memory__recompute": "some"}, "'none', 'selective' or 'full'"),
        ({"optimizer__betas": [0.9]}, "optimizer.betas"),
        ({"optimizer__betas": [0.9, 1.5]}, "optimizer.betas[1]=1.5 must be less than 1"),
        ({"optimizer__lr": float("inf")}, "must be a finite number"),
        ({"run__dir": 7}, "must be text; put it into quotes"),
        ({"run__seed": -1}, "run.seed=-1"),
        ({"schedule__name": "sine"}, "'cosine', 'exponential' or 'wsd'"),
        ({"model__dropout": 1.0}, "model.dropout=1.0 must be less than 1"),
    ],
)
def test_one_problem_one_message(changes, says):
    text = message(**changes)
    assert says in text
    assert "1 problem\n" in text


def test_pipelines_are_accepted_where_the_pattern_has_the_cuts():
    assert config(model__pattern="MM|MM", layout__pipeline=2).layout.pipeline == 2
    both = config(model__pattern="M|M|M|M", layout__pipeline=2, layout__virtual=2)
    assert both.layout.virtual == 2


def test_check_world():
    small = config(layout__tensor=2)
    assert check_world(small, 2) == 1
    assert check_world(small, 4) == 2
    for world, says in ((1, "1 process cannot hold"), (3, "start 2 or a multiple of 2")):
        with pytest.raises(ConfigError, match=says):
            check_world(small, world)
    with pytest.raises(ConfigError, match=r"data.global_batch=16 .* use a multiple of 12.*24"):
        check_world(small, 6)


def test_interleaved_schedule_needs_whole_rounds_of_micro_batches():
    changes = {"model__pattern": "M|M|M|M", "layout__pipeline": 2, "layout__virtual": 2}
    assert check_world(config(**changes), 2) == 1
    with pytest.raises(ConfigError, match=r"there are 3 .* use data.global_batch=16"):
        check_world(config(**changes, data__global_batch=12), 2)


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


def test_saved_config_reads_back_equal(tmp_path):
    first = config(
        optimizer__betas=[0.8, 0.99], model__gate_soft_cap=None, run__dir="7", optimizer__lr=3e-4
    )
    save_config(first, tmp_path / "new" / "config.yaml")
    assert load_config(tmp_path / "new" / "config.yaml") == first
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "config.yaml"]


def test_overrides_win_over_the_file(tmp_path):
    path = write(tmp_path / "run.yaml", raw(optimizer__lr=1e-3, layout__tensor=2))
    words = (
        "--optimizer.lr 3e-4 --optimizer.betas 0.8 0.9 --layout.sequence --run.dir 5 "
        "--model.gate-soft-cap none --logging.no-tensorboard --run.steps=7 "
        "--model.igate_bias_init -2.5"
    ).split()
    loaded = load_config(path, words)
    assert loaded.optimizer.lr == 3e-4
    assert loaded.optimizer.betas == (0.8, 0.9)
    assert loaded.layout.sequence is True
    assert loaded.layout.tensor == 2
    assert loaded.run.dir == "5"
    assert loaded.model.gate_soft_cap is None
    assert loaded.logging.tensorboard is False
    assert loaded.run.steps == 7
    assert loaded.model.igate_bias_init == -2.5
    assert load_config(path, {"optimizer.lr": 3e-4}).optimizer.lr == 3e-4


def test_switches_that_may_be_left_open(tmp_path):
    path = write(tmp_path / "run.yaml", raw())
    words = ["--engine.overlap_grad_reduce", "--engine.no-overlap-param-gather"]
    engine = load_config(path, words).engine
    assert (engine.overlap_grad_reduce, engine.overlap_param_gather) == (True, False)
    words = ["--engine.overlap_grad_reduce", "null", "--run.steps", "7"]
    assert load_config(path, words).engine.overlap_grad_reduce is None
    assert load_config(path, override_option("engine.overlap_grad_reduce", None)) == load_config(
        path
    )


def test_problems_of_file_and_command_line_come_together(tmp_path):
    path = write(tmp_path / "run.yaml", raw(optimizer__lr=-1))
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["--run.stepz", "5", "--data.seq_len", "long"])
    text = str(caught.value)
    assert "3 problems" in text
    assert "run.stepz is no key of a run file; did you mean run.steps?" in text
    assert "data.seq_len='long'" in text
    assert "optimizer.lr=-1" in text


def test_overrides_are_told_from_other_words():
    rest, found = split_overrides(
        ["--run.steps", "5", "run.yaml", "--nproc", "2", "--layout.sequence", "x.y", "--a.b"]
    )
    assert rest == ["run.yaml", "--nproc", "2", "x.y"]
    assert found == {"run.steps": "5", "layout.sequence": "true", "a.b": ""}


@pytest.mark.parametrize(
    "words", [["--run.steps"], ["--optimizer.betas", "0.9"], ["--run.steps", "--layout.sequence"]]
)
def test_an_option_without_its_value_is_refused(words):
    with pytest.raises(ConfigError, match="needs"):
        split_overrides(words)


@pytest.mark.parametrize(
    ("key", "value"),
    [("optimizer.betas", ["0.8", "0.9"]), ("model.chunk_size", None), ("run.steps", "5")],
)
def test_override_option_is_the_inverse(key, value):
    assert split_overrides(override_option(key, value)) == ([], {key: value})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "does not exist; give the path of a run file"),
        ("", "holds no sections"),
        ("- a\n- b\n", "holds no sections"),
        ("run: {", "is no valid YAML"),
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


def test_every_preset_has_a_file():
    assert {p.stem for p in CONFIGS.glob("*.yaml") if not p.stem.startswith("cpu_")} == set(PRESETS)


def test_describe_says_how_processes_are_used():
    text = describe_run(config(layout__tensor=2), 4)
    assert "2 data parallel replicas, 2 micro-batches of 4 rows" in text
    assert "tokens per step   4,096" in text


def test_configuration_needs_no_torch():
    code = (
        "import sys, pretrain.config, pretrain.cli, pretrain.commands.launch; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


TWO = [{"name": "a", "path": "x", "weight": 1}, {"name": "b", "path": "y", "weight": 2}]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__path": None}, "data.path is missing; set it"),
        ({"data__sources": TWO}, "data.path='data' and data.sources are both given"),
        ({"data__phases": [{"from_sample": 5, "weights": {"a": 1}}]}, "there are none; name"),
        ({"data__path": "s3://b/x"}, "data.path='s3://b/x' is remote, and its shards"),
        ({"data__sources": [*TWO, TWO[0]]}, "the name 'a' is given 2 times"),
        ({"data__sources": [dict(TWO[0], weight=0)]}, "data.sources[0].weight=0 must be greater"),
        ({"data__sources": [dict(TWO[0], wieght=1)]}, "data.sources[0] has no wieght; its keys"),
        ({"data__sources": [{"name": "a"}]}, "data.sources[0].path is missing"),
        ({"data__sources": [dict(TWO[0], weight=1e-5), TWO[1]]}, "smallest that a mixture can"),
        ({"data__sources": [TWO[0], dict(TWO[1], weight=None)]}, "would never be read"),
        (
            {"data__sources": TWO, "data__phases": [{"from_sample": 5, "weights": {"c": 1}}]},
            "data.phases[0]: 'c' is none of data.sources; use a, b",
        ),
        (
            {
                "data__sources": TWO,
                "data__phases": [{"from_sample": n, "weights": {"a": 1}} for n in (9, 9)],
            },
            "data.phases[1].from_sample=9 does not come after 9",
        ),
        (
            {"data__batch_ramp": [{"steps": 2, "global_batch": 6}]},
            "data.micro_batch=4 does not divide data.batch_ramp[0].global_batch=6",
        ),
    ],
)
def test_rules_of_the_data_section(changes, says):
    assert says in message(**changes)


def test_every_stage_of_a_ramp_splits_over_the_replicas():
    ramped = config(data__batch_ramp=[{"steps": 2, "global_batch": 4}])
    assert check_world(ramped, 1) == 1
    with pytest.raises(ConfigError, match=r"data.batch_ramp\[0\].global_batch=4 .* such as 8"):
        check_world(ramped, 2)
    assert "25,600,000 tokens" not in describe_run(ramped)
    assert f"{(98 * 16 + 2 * 4) * 256:,} (100 steps)" in describe_run(ramped)


def test_the_data_section_that_the_documents_show():
    text = (CONFIGS.parents[1] / "docs/data.md").read_text(encoding="utf-8")
    shown = text.split("## Data of a run")[1].split("```yaml\n")[1].split("```")[0]
    data = config_from_dict({**raw(), **yaml.safe_load(shown)}).data
    assert [s.name for s in data.sources] == ["web", "code", "books"] and data.phases


def test_lists_on_the_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw()))
    loaded = load_config(path, ["--data.batch_ramp", "[{steps: 2, global_batch: 4}]"])
    assert loaded.data.ramp.sizes == [4, 16]
    with pytest.raises(ConfigError, match=r"data.batch_ramp='\{' must be a valid list"):
        load_config(path, ["--data.batch_ramp", "{"])
