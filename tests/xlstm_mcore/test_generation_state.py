"""Prefill and step: a sequence read in parts through the caches equals one read at once."""

import pytest
import torch

from xlstm_mcore.build import build_model, make_config
from xlstm_mcore.inference import prepare_for_tokens, single_process_groups
from xlstm_mcore.parameters.slices import named_slices

SMALL = {"hidden_size": 64, "num_heads": 4, "vocab_size": 96, "norm_eps": 1e-3}


def make_model(pattern, **keys):
    config = make_config({**SMALL, "pattern": pattern, **keys})
    (model,) = build_model(config, single_process_groups(), seed=0)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():  # zero recurrent weights and gates at -10 would hide the state
        for name, parameter, _ in named_slices(model):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
            if name.endswith("gate_bias"):
                parameter.clamp_(min=-1.0)
    return model.eval()


def tensors(cache):
    for layer in cache.values():
        for state in layer.values():
            yield from state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("pattern", ["M", "m", "s", "Mmsm"])
@pytest.mark.parametrize("parts", [[17], [1] * 17, [5, 1, 1, 7, 1, 2], [1, 3, 1, 1, 11]])
def test_a_sequence_in_parts_equals_one_at_once(pattern, parts):
    model = make_model(pattern)
    tokens = torch.randint(0, 96, (2, sum(parts)), generator=torch.Generator().manual_seed(2))
    cache, logits = {}, []
    with torch.no_grad():
        whole = model(tokens)
        for part in tokens.split(parts, dim=1):
            logits.append(model(part, cache=cache))
    error = (torch.cat(logits, 1) - whole).abs().max() / whole.abs().max()
    assert error < 2e-5


@pytest.mark.parametrize("pattern", ["M", "ms"])
def test_cell_states_are_updated_in_place(pattern):
    model = make_model(pattern)
    cache: dict = {}
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.int64), cache=cache)
        cells = [s for layer in cache.values() for k, s in layer.items() if k != "conv"]
        before = [t.clone() for state in cells for t in state]
        model(torch.ones(1, 1, dtype=torch.int64), cache=cache)
    now = [s for layer in cache.values() for k, s in layer.items() if k != "conv"]
    assert all(a is b for a, b in zip(cells, now, strict=True))
    after = [t for state in now for t in state]
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("pattern", ["Mm", "sl", "d*"])
def test_the_short_way_without_gradients_gives_the_same_bits(pattern):
    model = make_model(pattern)
    tokens = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(3))
    expected = model(tokens)
    assert expected.requires_grad
    with torch.no_grad():
        assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_laid_out_for_single_tokens_keep_their_values(tied):
    model = make_model("Mms*", tie_embeddings=tied)
    before = {name: (p.clone(), p.is_contiguous()) for name, p in model.named_parameters()}
    tokens = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(tokens)
        prepare_for_tokens(model)
        error = (model(tokens) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5
    laid_out = set()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        if before[name][1] and not parameter.is_contiguous():
            laid_out.add(name.split(".")[-2])
    assert laid_out == {"in_proj", "linear_fc1"} | (set() if tied else {"output_layer"})


def test_a_model_laid_out_for_single_tokens_trains_on_as_another():
    tokens = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(3))
    results = []
    for prepared in (False, True):
        model = make_model("Mms*")
        if prepared:
            prepare_for_tokens(model)
        logits = [model(tokens)]
        logits[0].logsumexp(-1).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
            logits.append(model(tokens))
        results.append(torch.stack([one.detach() for one in logits]))
    before, after = results[0]
    assert (after - before).abs().max() > 0.1, "the step changes nothing"
    assert (results[1] - results[0]).abs().max() < 1e-5 * results[0].abs().max()
