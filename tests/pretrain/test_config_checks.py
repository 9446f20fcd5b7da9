"""Rules between keys: each broken one has a message with a way out."""

import pytest
import torch

from pretrain.commands.before_run.check import describe_run
from pretrain.config import ConfigError, check_world
from pretrain.config.checks.kernels import check_gpu, check_kernels
from pretrain.planning.search import try_shape
from pretrain.rehearsal.gpus import gpu_named
from tests.pretrain.run_files import config, message


def test_every_broken_rule_is_in_one_message():
    text = message(
        model__num_heads=8,
        model__vocab_size=8191,
        layout__tensor=3,
        data__micro_batch=5,
        engine__zero_stage=2,
    )
    for part in (
        "4 problems",
        "layout.tensor=3 does not divide model.num_heads=8; use 1, 2, 4 or 8",
        "layout.tensor=3 does not divide model.vocab_size=8191; use model.vocab_size=8193",
        "data.micro_batch=5 does not divide data.global_batch=16; use 1, 2, 4, 8 or 16",
        "engine.zero_stage=2: Megatron's distributed optimizer shares out",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
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
        (
            {"model__pattern": "M*", "model__attention_sinks": 4},
            "model.attention_window=null lets * see all tokens; set model.attention_window, or",
        ),
        ({"model__pattern": "MM|MM"}, "has 2 stages, but layout.pipeline=1"),
        (
            {"engine__name": "deepspeed", "engine__offload": "optimizer", "logging__cells": 5},
            "use logging.cells=0 or engine.offload=none",
        ),
        ({"layout__pipeline": 2, "model__pattern": "M|M|MM"}, "write 1 cut (|) into the pattern"),
        (
            {"layout__pipeline": 8},
            "has 4 blocks, but layout.pipeline=8 times",
        ),
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
            "leaves 2 tokens of data.seq_len=16 to a process, but the convolution of m and d looks "
            "back model.conv_width - 1 = 3 tokens, into one process at most; use layout.context=1, "
            "2 or 4",
        ),
        (
            {"model__pattern": "Ms", "layout__context": 8},
            "cannot be cut; use layout.context=1, 2 or 4",
        ),
        (
            {"model__pattern": "Ms", "layout__context": 4, "layout__tensor": 2},
            "cannot be cut; use layout.context=1 or 2",
        ),
        ({"engine__zero_stage": 0}, "the nearest combination that works has engine.zero_stage=1"),
        ({"engine__zero_stage": 2}, "nearest combination that works has engine.name=deepspeed"),
        (
            {"optimizer__name": "muon", "engine__zero_stage": 1},
            "optimizer.name=muon, engine.zero_stage=1: Muon shares out whole matrices",
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
        ({"schedule__name": "wsd"}, "example, 10 (a tenth of run.steps)"),
        (
            {"schedule__cooldown_shape": "exponential", "schedule__cooldown_steps": 5},
            "cooldown_min_lr_ratio=0 is never reached",
        ),
        ({"schedule__warmup_steps": 101}, "do not fit into run.steps=100"),
        ({"schedule__name": "exponential", "schedule__min_lr_ratio": 0.0}, "is never reached"),
        (
            {"model__pattern": "m", "model__qkv_block_size": 48},
            "model.qkv_block_size=48 does not divide the width 64 of a head of the m blocks",
        ),
        (
            {"model__pattern": "m", "model__num_heads": 2, "model__round_up_to": 2}
            | {"model__hidden_size": 6, "model__qkv_block_size": 4},
            "inner width 12 over model.num_heads=2; use 1, 2, 3 or 6, or other heads",
        ),
        (
            {"model__pattern": "m", "data__seq_len": 3, "layout__context": 3}
            | {"model__conv_width": 9},
            "looks back model.conv_width - 1 = 8 tokens, into one process at most; use "
            "layout.context=1",
        ),
        (
            {"model__tie_embeddings": True, "model__pattern": "MM|MM", "layout__pipeline": 2}
            | {"engine__name": "deepspeed", "engine__precision": "bf16"}
            | {"engine__offload": "optimizer", "engine__zero_stage": 1},
            "their gradients leave for the host before they can be added; use engine.offload=none",
        ),
        ({"model__logit_soft_cap": 1e-300}, "must be greater than or equal to 0.001"),
        (
            {"model__igate_bias_init": -1e38},
            "model.igate_bias_init=-1e+38 is too large for fp32; use at most 1e+30",
        ),
        ({"model__chunk_size": 2**63}, "model.chunk_size=9223372036854775808 is too large"),
        (
            {"layout__tensor": 4, "model__round_up_to": 2, "model__ffn_dim_factor": 1.01},
            "set model.round_up_to to a multiple of 4",
        ),
        (
            {"memory__recompute_full_blocks": "Ms"},
            "'s', which model.pattern does not contain",
        ),
    ],
)
def test_a_broken_rule_has_one_message(changes, says):
    text = message(**changes)
    assert says in text
    assert "1 problem\n" in text


def test_pipelines_are_accepted_where_the_pattern_has_the_cuts():
    assert config(model__pattern="MM|MM", layout__pipeline=2).layout.pipeline == 2
    both = config(model__pattern="M|M|M|M", layout__pipeline=2, layout__virtual=2)
    assert both.layout.virtual == 2


def test_a_pattern_without_cuts_is_cut_where_the_work_is_even():
    """The head of a vocabulary of 8,192 is more work than all blocks of this width."""
    assert config(layout__pipeline=2).model.pattern == "MMM|M"
    assert config(layout__pipeline=2, model__vocab_size=64).model.pattern == "MM|MM"
    both = config(layout__pipeline=2, layout__virtual=2, model__vocab_size=64)
    assert both.model.pattern == "M|M|M|M"
    assert config(layout__pipeline=2, model__pattern="M|MMM").model.pattern == "M|MMM"
    assert config().model.pattern == "MMMM"


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
            "data.phases[0]: 'c' is not one of data.sources; use a, b",
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


# ------------------------------------------------------------------ the persistent sLSTM

PERSISTENT = {
    "model__pattern": "ms",
    "model__hidden_size": 2048,
    "engine__precision": "bf16",
    "memory__slstm_form": "persistent",
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__pattern": "mm"}, "memory.slstm_form=persistent, but model.pattern has no s"),
        ({"engine__precision": "fp32"}, "keeps weights in bf16, and engine.precision=fp32"),
        ({"model__slstm_input_gate": "sigmoid"}, "has an exponential input gate only"),
        ({"model__kernel_backend": "torch"}, "runs on Triton, and model.kernel_backend=torch"),
        (
            {"model__hidden_size": 4096},
            "fits none of a100-40, a100, h100, h200, b200: of the largest, 4 rows of 4 heads of "
            "1024 are 256 programs that must run at the same time, and the GPU has 148 processors; "
            "use memory.slstm_form=graphs, a smaller data.micro_batch or a larger layout.tensor",
        ),
    ],
)
def test_the_persistent_slstm_says_what_it_cannot_do(changes, says):
    assert says in message(**PERSISTENT | changes)


def test_check_names_the_gpus_that_hold_the_persistent_slstm():
    assert "persistent, fits a100-40, a100, h100, h200, b200\n" in describe_run(
        config(**PERSISTENT)
    )
    half = {"model__hidden_size": 4096, "layout__tensor": 2}
    text = describe_run(config(**PERSISTENT | half))
    assert "persistent, fits h100, h200, b200; not a100-40 or a100\n" in text
    assert "persistent" not in describe_run(config())


def test_a_gpu_that_does_not_hold_the_persistent_slstm_is_an_error_of_its_plan():
    half = {"model__hidden_size": 4096, "layout__tensor": 2}
    check_gpu(config(**PERSISTENT | half), gpu_named("h100"))
    with pytest.raises(ConfigError, match="does not fit a100: 16 columns of a head of 1024 take"):
        check_gpu(config(**PERSISTENT | half), gpu_named("a100"))
    tried = try_shape(config(**PERSISTENT | half), (2, 1), 2, gpu_named("a100"))
    assert tried and all("does not fit a100" in one.why_not for one in tried)


def test_the_persistent_slstm_needs_a_gpu_to_train_on():
    with pytest.raises(ConfigError, match="needs a GPU, and this run is on the CPU"):
        check_kernels(config(**PERSISTENT), torch.device("cpu"))
    check_kernels(config(), torch.device("cpu"))
