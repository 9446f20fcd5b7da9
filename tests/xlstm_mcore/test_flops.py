"""FLOPs: the formulas against torch's counter and against the figures of the papers."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.xlstm_mcore.test_presets import model
from xlstm_kernels.qkv import tiles
from xlstm_mcore.build import build_model, make_config
from xlstm_mcore.inference import single_process_groups
from xlstm_mcore.mixers import attention, kernel_calls
from xlstm_mcore.modules.norm import Norm
from xlstm_mcore.sizes.flops import (
    attended_pairs,
    block_flops,
    chunkwise_cell_flops,
    forward_flops,
    mlstm_cell_flops,
    peak_tflops,
    state_bytes,
    training_flops,
)
from xlstm_mcore.sizes.presets import PRESETS

SMALL = {
    "hidden_size": 64,
    "num_heads": 4,
    "vocab_size": 96,
    "round_up_to": 16,
    "conv_width": 3,
    "dropout": 0.0,
}
BATCH, LENGTH = 2, 12


def elementwise_mlstm(q, k, v, igate, fgate, state=None, **options):
    """Depends on every input and costs no matrix product, so that only the layers are counted."""
    return v * ((q * k).sum(-1) + igate + fgate)[..., None]


def elementwise_slstm(preacts, recurrent_weight, bias, state=None, **options):
    return (preacts + bias).prod(2) + recurrent_weight.mean(), None


@pytest.mark.parametrize("pattern", ["M", "m", "s", "Mmsm", "M*", "ld"])
@pytest.mark.parametrize("tied", [False, True])
def test_layers_equal_torchs_counter_forward_and_backward(pattern, tied, monkeypatch):
    monkeypatch.setattr(kernel_calls, "mlstm_chunkwise", elementwise_mlstm)
    monkeypatch.setattr(kernel_calls, "slstm_scan", elementwise_slstm)
    monkeypatch.setattr(kernel_calls, "lstm_scan", elementwise_slstm)
    monkeypatch.setattr(tiles, "TILE", 1)  # products with the zeros in a tile do not count
    monkeypatch.setattr(attention, "attend", lambda q, k, v, boundaries, span: q * k * v)
    groups = single_process_groups()
    config = make_config({**SMALL, "pattern": pattern, "tie_embeddings": tied})
    (built,) = build_model(config, groups, seed=0)
    tokens = torch.randint(0, 96, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as forward:
        loss = built(tokens, None, tokens).sum()
    # Torch's table leaves this one out.
    in_place = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as backward:
        loss.backward()
    parts = forward_flops(config, LENGTH)
    # The convolution's taps are elementwise in our implementation, and the cells are replaced.
    expected = sum(parts[name] for name in ("projections", "feed_forward", "head"))
    assert forward.get_total_flops() == BATCH * LENGTH * expected
    # RMSNorm sums its weight's gradient by a product, one multiplication for each number it reads.
    expected += SMALL["hidden_size"] * sum(isinstance(part, Norm) for part in built.modules())
    assert backward.get_total_flops() == 2 * BATCH * LENGTH * expected


def test_cells_equal_torchs_counter_on_their_equations():
    qk, v, d, heads, chunk = 6, 10, 8, 3, 16
    with FlopCounterMode(display=False) as counter:
        k_t, v_t, q_t = torch.randn(heads, qk, 1), torch.randn(heads, v, 1), torch.randn(heads, qk)
        memory = torch.bmm(k_t, torch.cat((v_t, torch.ones(heads, 1, 1)), 1).transpose(1, 2))
        torch.bmm(q_t[:, None], memory)  # C and n side by side
    assert counter.get_total_flops() == heads * mlstm_cell_flops(qk, v)

    with FlopCounterMode(display=False) as counter:
        torch.bmm(torch.randn(heads, 4, d)[:, :1], torch.randn(heads, d, 4 * d))
    settings = model(pattern="s", hidden_size=heads * d, num_heads=heads, vocab_size=1)
    assert counter.get_total_flops() == forward_flops(settings)["cell"]

    with FlopCounterMode(display=False) as counter:
        q, k, values = (torch.randn(heads, chunk, n) for n in (qk, qk, v + 1))
        scores = torch.bmm(q, k.transpose(1, 2))
        torch.bmm(scores, values)
        torch.bmm(q, torch.bmm(k.transpose(1, 2), values))
    assert counter.get_total_flops() == heads * chunk * chunkwise_cell_flops(qk, v, chunk)


@pytest.mark.parametrize(
    ("preset", "thousand_tokens", "mfu"),
    [("xlstm_7b", 9.15, 37), ("xlstm_large_1.3b", 37.03, 30), ("xlstm_large_165m", 225.99, 17)],
)
def test_published_speeds_are_the_known_shares_of_an_h100(preset, thousand_tokens, mfu):
    """Table 2 of arXiv 2503.13427 on H100; the shares were worked out before this code existed."""
    flops = training_flops(model(**PRESETS[preset].model))
    share = 100 * thousand_tokens * 1e3 * flops / (peak_tflops("NVIDIA H100 80GB HBM3") * 1e12)
    assert share == pytest.approx(mfu, abs=0.8)


def test_the_7b_cell_is_the_known_small_part():
    parts = forward_flops(model(**PRESETS["xlstm_7b"].model))
    assert 0.008 < parts["cell"] / sum(parts.values()) < 0.014
    # Six per parameter that multiplies, which all but the embedding, norms and biases do.
    matrices = 6_865_424_896 - 50304 * 4096
    assert sum(parts.values()) - parts["cell"] == pytest.approx(2 * matrices, rel=1e-4)


def test_state_of_the_7b_is_table_3():
    size = state_bytes(model(**PRESETS["xlstm_7b"].model), activation_bytes=2)
    assert size == pytest.approx(134.2e6, rel=0.003)  # the paper counts C alone


def test_attention_is_counted_by_the_mean_of_what_a_token_sees():
    shape = model(pattern="M*", hidden_size=64, num_heads=4, vocab_size=96)
    pairs = sum(t + 1 for t in range(10))  # of one row of 10 tokens
    assert forward_flops(shape, 10)["cell"] - forward_flops(shape, 1)["cell"] == 2 * 64 * 9
    assert block_flops("*", shape, 10)["cell"] * 10 == 2 * 2 * 64 * pairs
    with pytest.raises(ValueError, match="pass seq_len"):
        training_flops(shape)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (3, 2), (4, 9), (10, 1), (12, 3)])
def test_a_window_and_its_sinks_are_counted_token_by_token(window, sinks):
    keys = {"attention_window": window, "attention_sinks": sinks}
    shape = model(pattern="*", hidden_size=64, num_heads=4, vocab_size=96, **keys)
    pairs = sum(q - k < window or k < sinks for q in range(10) for k in range(q + 1))
    assert attended_pairs(shape, 10) == pairs


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        *((letter, {}) for letter in "Mmsld*"),
        ("*", {"attention_window": 2, "attention_sinks": 3}),
        ("*", {"attention_window": 8, "attention_sinks": 1}),
    ],
)
def test_state_bytes_equal_the_caches(pattern, keys):
    groups = single_process_groups()
    config = make_config({**SMALL, "pattern": pattern, **keys})
    (built,) = build_model(config, groups, seed=0)
    cache = {}
    with torch.no_grad():
        built.eval()(torch.randint(0, 96, (1, 5)), cache=cache)
    held = sum(
        t.nbytes
        for layer in cache.values()
        for state in layer.values()
        for t in (state if isinstance(state, tuple) else (state,))
        if isinstance(t, torch.Tensor)  # attention also counts its tokens
    )
    assert held == state_bytes(config, activation_bytes=4, tokens=5)


def test_unknown_devices_have_no_peak():
    assert peak_tflops("some cpu") is None
    assert peak_tflops("NVIDIA H100 PCIe") < peak_tflops("NVIDIA H100 80GB HBM3")
