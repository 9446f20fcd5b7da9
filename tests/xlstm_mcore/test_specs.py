"""The layers inside megatron-core's GPTModel: the same model as XLSTMModel."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams

from xlstm_mcore.build import build_model, make_config
from xlstm_mcore.gpt_specs import GPTLayer, gpt_layer_spec, prepare_gpt_model
from xlstm_mcore.inference import single_process_groups
from xlstm_mcore.megatron import cpu_runtime
from xlstm_mcore.parameters.slices import named_slices

SECTION = {
    "pattern": "Mms*",
    "hidden_size": 32,
    "num_heads": 2,
    "vocab_size": 40,
    "round_up_to": 16,
    "norm_eps": 1e-4,
}


@pytest.fixture(scope="module", autouse=True)
def groups():
    return single_process_groups()


def both(groups, **changes):
    config = make_config({**SECTION, **changes})
    (ours,) = build_model(config, groups, seed=3)
    cpu_runtime.activate()
    theirs = GPTModel(
        config=config,
        transformer_layer_spec=gpt_layer_spec(config),
        vocab_size=config.vocab_size,
        max_sequence_length=24,
        share_embeddings_and_output_weights=config.tie_embeddings,
        position_embedding_type="none",
        pg_collection=groups,
    )
    prepare_gpt_model(theirs, config, seed=3)
    return config, ours, theirs


def mask_of(boundaries):
    """Megatron-LM's mask of causal attention inside documents, True where it is forbidden."""
    document = boundaries.int().cumsum(1)
    s = boundaries.shape[1]
    apart = document[:, :, None] != document[:, None, :]
    future = torch.ones(s, s, dtype=torch.bool).triu(1)
    return (apart | future)[:, None]


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "logit_soft_cap": None}])
def test_gpt_model_gives_the_same_logits_losses_and_gradients(groups, changes):
    _, ours, theirs = both(groups, **changes)
    rng = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, 40, (2, 2, 24), generator=rng)
    boundaries = torch.rand(2, 24, generator=rng) < 0.2
    boundaries[:, 0] = False
    positions = torch.arange(24).expand(2, -1)
    mask = mask_of(boundaries)
    with torch.no_grad():
        got = theirs(tokens, positions, mask)
        assert (got - ours(tokens, boundaries)).abs().max() < 1e-6 * got.abs().max()
    theirs(tokens, positions, mask, labels=labels).sum().backward()
    ours(tokens, boundaries, labels).sum().backward()

    def gradients(model):
        return {slices[0].name: p.grad for _, p, slices in named_slices(model)}

    expected = gradients(ours)
    found = gradients(theirs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 2e-5 * value.abs().max(), name


@pytest.mark.parametrize("behind", [[], [24, 24]], ids=["plain", "empty documents"])
@pytest.mark.parametrize("padded", [False, True])
def test_packed_rows_are_cut_at_their_lengths(groups, padded, behind):
    _, ours, theirs = both(groups)
    tokens = torch.randint(0, 40, (1, 24), generator=torch.Generator().manual_seed(1))
    boundaries = torch.zeros(1, 24, dtype=torch.bool)
    boundaries[0, [5, 6, 17]] = True
    starts = torch.tensor([0, 5, 6, 17, 24, *behind], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)
    if padded:  # then the plain lengths leave the padding out, and the tokens do not lie there
        packed.cu_seqlens_q_padded, packed.cu_seqlens_q = starts, starts // 2
    with torch.no_grad():
        got = theirs(tokens, torch.arange(24)[None], None, packed_seq_params=packed)
        assert (got - ours(tokens, boundaries)).abs().max() < 1e-6 * got.abs().max()
        without = theirs(tokens, torch.arange(24)[None], None)
    assert (got - without).abs().max() > 1e-3


def test_context_parallelism_is_refused():
    """Megatron-LM's slices of a row are not in order, and nothing else would notice."""
    groups = SimpleNamespace(cp=SimpleNamespace(size=lambda: 2))
    with pytest.raises(ValueError, match="contiguous slices in order; use context_parallel_size=1"):
        GPTLayer(None, None, layer_number=1, pg_collection=groups)


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="this megatron-core's wheel holds no megatron.training (0.19 does)",
)
def test_five_steps_of_megatrons_own_trainer_equal_ours():
    """In a process of its own: Megatron-LM's trainer lives in global variables."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.xlstm_mcore.megatron_training"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(results["ours"]) == 5
    for theirs, ours in zip(results["megatron"], results["ours"], strict=True):
        assert theirs == pytest.approx(ours, rel=5e-5)
        assert theirs[0] == pytest.approx(ours[0], rel=2e-6)
