"""Wrong arguments end in a ValueError that says the value, the rule and the remedy."""

import pytest
import torch

from xlstm_kernels import (
    causal_conv1d,
    mlstm_chunkwise,
    mlstm_step,
    multihead_norm,
    slstm_scan,
    slstm_step,
)

B, H, S, K, V = 2, 3, 5, 4, 6


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


def mlstm_arguments():
    return {
        "q": zeros(B, H, S, K),
        "k": zeros(B, H, S, K),
        "v": zeros(B, H, S, V),
        "igate_preact": zeros(B, H, S),
        "fgate_preact": zeros(B, H, S),
    }


def slstm_arguments():
    return {
        "gate_preacts": zeros(B, S, 4, H, K),
        "recurrent_weight": zeros(4, H, K, K),
        "bias": zeros(4, H, K),
    }


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": zeros(B, S, K)}, r"q has shape \[2, 5, 4\].*\[b, heads, s, qk_dim\].*permute"),
        ({"k": zeros(B, H, S, K + 1)}, r"k has shape .*\[2, 3, 5, 4\]"),
        ({"v": zeros(B, H, S + 1, V)}, r"v has shape .*\[2, 3, 5, 6\]"),
        ({"v": zeros(B, H, S, V).double()}, r"v has dtype torch.float64 and q torch.float32"),
        ({"q": zeros(B, H, S, K, dtype=torch.int64)}, r"q has dtype torch.int64.*floating"),
        ({"q": zeros(B, H, 0, K)}, r"q has shape .*empty"),
        ({"igate_preact": zeros(B, S, H)}, r"igate_preact has shape \[2, 5, 3\]"),
        ({"fgate_preact": zeros(B, H, S, device="meta")}, r"fgate_preact is on meta.*cpu"),
        (
            {"boundaries": zeros(B, S, dtype=torch.bool, device="meta")},
            r"boundaries is on meta.*move it to cpu",
        ),
        ({"chunk_size": -64}, r"chunk_size=-64 must be a positive integer"),
        ({"chunk_size": 0}, r"chunk_size=0 must be a positive integer; use"),
        ({"chunk_size": 16.0}, r"chunk_size=16.0 must be a positive integer"),
        ({"gate_soft_cap": 0.0}, r"gate_soft_cap=0.0 must be positive.*None for no cap"),
        ({"gate": "relu"}, r"gate='relu' is not known; use one of 'exp', 'sigmoid'"),
        ({"boundaries": zeros(B, S)}, r"boundaries has dtype torch.float32.*\.bool\(\)"),
        ({"boundaries": zeros(S, B, dtype=torch.bool)}, r"boundaries has shape \[5, 2\].*\[2, 5\]"),
        ({"initial_state": (zeros(B, H, K, V),)}, r"the state is tuple of length 1.*C, n, m"),
        (
            {"initial_state": (zeros(B, H, V, K), zeros(B, H, K), zeros(B, H))},
            r"state C has shape .*\[2, 3, 4, 6\]",
        ),
        ({"backend": "warp"}, r"backend='warp' does not exist.*'torch'"),
    ],
)
def test_mlstm_chunkwise(change, message):
    with pytest.raises(ValueError, match=message):
        mlstm_chunkwise(**(mlstm_arguments() | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gate_preacts": zeros(B, S, H, 4, K)}, r"gate_preacts has 3 gates.*i, f, z, o"),
        ({"gate_preacts": zeros(B, S, 4, H * K)}, r"gate_preacts has shape .*5 axes"),
        ({"recurrent_weight": zeros(H, 4, K, K)}, r"recurrent_weight has shape .*\[4, 3, 4, 4\]"),
        ({"bias": zeros(4, H * K)}, r"bias has shape \[4, 12\].*\[4, 3, 4\]"),
        ({"forget_gate": "tanh"}, r"forget_gate='tanh'.*'sigmoid', 'exp'"),
        ({"boundaries": zeros(B, dtype=torch.bool)}, r"boundaries has shape \[2\]"),
        ({"initial_state": (zeros(B, H, K),) * 3}, r"length 3.*h, c, n, m"),
        ({"backend": "cuda"}, r"backend='cuda' does not exist.*'torch'"),
    ],
)
def test_slstm_scan(change, message):
    with pytest.raises(ValueError, match=message):
        slstm_scan(**(slstm_arguments() | change))


def test_steps_need_a_state():
    one = {name: x[:, :, 0] for name, x in mlstm_arguments().items()}
    with pytest.raises(ValueError, match=r"state=None.*zeros"):
        mlstm_step(**one, state=None)
    arguments = slstm_arguments()
    arguments["gate_preacts"] = arguments["gate_preacts"][:, 0]
    with pytest.raises(ValueError, match=r"state=None.*zeros"):
        slstm_step(**arguments, state=None)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": zeros(B, S)}, r"x has shape \[2, 5\].*\[b, s, c\]"),
        ({"weight": zeros(K, 1, 4)}, r"weight has shape .*\[c, width\]"),
        ({"weight": zeros(K + 1, 4)}, r"weight has shape \[5, 4\].*\[4, 4\]"),
        ({"bias": zeros(K + 1)}, r"bias has shape \[5\]"),
        ({"initial_state": zeros(B, 3, K)}, r"initial_state has shape \[2, 3, 4\].*\[2, 4, 3\]"),
        ({"activation": "gelu"}, r"activation='gelu'.*None, 'silu'"),
        ({"boundaries": zeros(B, S + 1, dtype=torch.bool)}, r"boundaries has shape \[2, 6\]"),
    ],
)
def test_causal_conv1d(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**({"x": zeros(B, S, K), "weight": zeros(K, 4)} | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": zeros(K)}, r"x has shape \[4\].*\[\.\.\., heads, d\]"),
        ({"weight": zeros(H, K)}, r"weight has shape \[3, 4\].*\[12\]"),
        ({"layout": "by head"}, r"x has shape \[2, 3, 4\].*\[b, heads, s, d\]"),
        ({"layout": "columns"}, r"layout='columns'.*'heads last', 'row', 'by head'"),
        ({"gate": zeros(B, K, H)}, r"gate has shape \[2, 4, 3\].*\[2, 3, 4\]"),
        ({"backend": "warp"}, r"backend='warp' does not exist for multihead_norm"),
        ({"kind": "batchnorm"}, r"kind='batchnorm'.*'layernorm', 'rmsnorm'"),
    ],
)
def test_multihead_norm(change, message):
    arguments = {"x": zeros(B, H, K), "weight": zeros(H * K), "kind": "layernorm", "eps": 1e-5}
    with pytest.raises(ValueError, match=message):
        multihead_norm(**(arguments | change))
