"""The GPU benchmark of training steps runs: here at tiny size, on a CPU."""

import pytest

from benchmarks import train_step_gpu
from pretrain import layout as layouts

TINY = [
    "model.hidden_size=64",
    "model.num_heads=2",
    "model.vocab_size=128",
    "data.seq_len=32",
    "engine.precision=fp32",
]


@pytest.mark.parametrize("name", train_step_gpu.SIZES)
def test_every_size_has_a_sound_configuration(name):
    size = train_step_gpu.SIZES[name]
    assert train_step_gpu.run_config(size, 1, []).engine.precision == "bf16"
    many = train_step_gpu.run_config(size, 8, ["engine.name=deepspeed", "engine.zero_stage=2"])
    assert many.data.global_batch == 32 * size.micro_batch
    assert len(many.model.pattern) > 4


def test_a_step_is_measured(capsys):
    layouts.leave()  # the group of one that an earlier test in this process may have joined
    config = train_step_gpu.run_config(train_step_gpu.SIZES["7B"], 1, TINY)
    try:
        got = train_step_gpu.measure(config, 1)
    finally:
        layouts.leave()
    assert got["tokens_per_second"] > 0 and got["tflops"] > 0 and got["main"]
    assert train_step_gpu.main(["--sizes", "160M"]) == 0
    assert "Nothing was timed" in capsys.readouterr().out
