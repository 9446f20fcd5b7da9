"""The class of exports against our model: logits, gradients, padding, caches and `generate`."""

import pytest
import torch

from pretrain import layout as layouts
from tests.xlstm_mcore.convert.hf_models import (
    ARCHITECTURES,
    STATEFUL,
    exported_model,
    exported_tensors,
    our_model,
)
from xlstm_mcore.hf import modeling_xlstm_blocks as modeling
from xlstm_mcore.hf.configuration_xlstm_blocks import XLSTMBlocksConfig

_pairs = {}


@pytest.fixture(scope="module", autouse=True)
def groups():
    yield
    layouts.leave()


@pytest.fixture(params=["plain", "kernels"])
def cells(request, monkeypatch):
    """Both ways through the cells: without `xlstm_kernels`, and with it."""
    if request.param == "plain":
        monkeypatch.setattr(modeling, "kernels", None)
    return request.param


def pair(name):
    if name not in _pairs:
        ours = our_model(name)
        _pairs[name] = ours, exported_model(ours)
    return _pairs[name]


def tokens_of(*shape, seed=0):
    return torch.randint(1, 70, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, limit=1e-5):
    assert (a - b).abs().max() <= limit * b.abs().max(), (a - b).abs().max() / b.abs().max()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_gradients_equal_ours(cells, name):
    ours, exported = pair(name)
    tokens, weight = tokens_of(2, 67), torch.randn(2, 67, 70, generator=torch.Generator())
    results = []
    for model in (ours, exported):
        model.zero_grad()
        logits = model(tokens) if model is ours else model(tokens, use_cache=False).logits
        (logits * weight).sum().backward()
        results.append(logits.detach())
    close(results[1], results[0])
    wanted = exported_tensors(ours, lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
    found = {n: p.grad for n, p in exported.named_parameters()}
    assert found.keys() == wanted.keys()
    largest = max(g.abs().max() for g in wanted.values())
    for key, want in wanted.items():
        error = (found[key] - want).abs().max()
        assert error <= 2e-4 * want.abs().max() + 1e-6 * largest, f"{key}: {error:.1e}"


@pytest.mark.parametrize("name", STATEFUL)
def test_padding_anywhere_changes_nothing(cells, name):
    _, exported = pair(name)
    lengths = [9, 1, 6]
    alone = [tokens_of(1, n, seed=n) for n in lengths]
    for places in (lambda n: range(9 - n, 9), lambda n: range(n), lambda n: range(0, 2 * n, 2)):
        width = 9 if places(9)[-1] < 9 else 18
        batch = torch.zeros(3, width, dtype=torch.int64)
        mask = torch.zeros_like(batch)
        for row, tokens in enumerate(alone):
            where = torch.tensor([p % width for p in places(lengths[row])])
            batch[row, where], mask[row, where] = tokens[0], 1
        with torch.no_grad():
            padded = exported(batch, attention_mask=mask, output_hidden_states=True)
            for row, tokens in enumerate(alone):
                single = exported(tokens, output_hidden_states=True)
                real = mask[row].bool()
                close(padded.logits[row, real], single.logits[0])
                for a, b in zip(padded.hidden_states, single.hidden_states, strict=True):
                    close(a[row, real], b[0])


@pytest.mark.parametrize("name", STATEFUL)
def test_a_cache_goes_on_after_padding_too(cells, name):
    """Three parts with padding left, in the middle and right, then a token each."""
    _, exported = pair(name)
    mask = torch.tensor(
        [
            [0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1],
            [1, 1, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1],
        ]
    )
    tokens = tokens_of(2, 12)
    cache, logits = None, []
    with torch.no_grad():
        for first, end in ((0, 5), (5, 8), (8, 11), (11, 12)):
            part = exported(
                tokens[:, first:end],
                attention_mask=mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = part.past_key_values
            logits.append(part.logits)
        logits = torch.cat(logits, dim=1)
        for row in range(2):
            real = mask[row].bool()
            close(logits[row, real], exported(tokens[row : row + 1, real]).logits[0])
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("name", STATEFUL)
def test_generate_with_padding_and_cache_equals_single_prompts_without(cells, name):
    _, exported = pair(name)
    prompts = [tokens_of(1, n, seed=n) for n in (7, 2, 5)]
    batch = torch.zeros(3, 7, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        batch[row, 7 - prompt.shape[1] :] = prompt[0]
    options = {"do_sample": False, "max_new_tokens": 6}
    for beams in (1, 3):
        options["num_beams"] = beams
        together = exported.generate(batch, attention_mask=(batch > 0).long(), **options)
        for row, prompt in enumerate(prompts):
            ones = torch.ones_like(prompt)
            for use_cache in (True, False):
                single = exported.generate(
                    prompt, attention_mask=ones, use_cache=use_cache, **options
                )
                assert torch.equal(together[row, 7:], single[0, prompt.shape[1] :])


@pytest.mark.parametrize("name", ["classic", "window"])
def test_the_state_has_a_constant_size(name):
    _, exported = pair(name)

    def numbers(length):
        cache = exported(tokens_of(1, length), use_cache=True).past_key_values
        states = [v for layer in cache.layers for v in layer.values()]
        return sum(t.numel() for v in states for t in (v if isinstance(v, tuple) else (v,)))

    with torch.no_grad():
        assert numbers(4) == numbers(40)


def test_gradient_checkpointing_and_the_loss_of_labels_equal_the_plain_pass():
    ours, exported = pair("hybrid")
    tokens = tokens_of(2, 20)
    tokens[0, :3] = -100
    inputs = tokens.clamp(min=0)
    plain = exported(inputs, labels=tokens).loss
    losses = ours(inputs[:, :-1], None, inputs[:, 1:])
    counted = tokens[:, 1:] != -100
    close(plain, losses[counted].mean())
    gradients = []
    for checkpointing in (False, True):
        exported.train()
        exported.zero_grad()
        if checkpointing:
            exported.activation_checkpointing_enable()
        exported(inputs, labels=tokens).loss.backward()
        gradients.append([p.grad.clone() for p in exported.parameters()])
        exported.activation_checkpointing_disable()
        exported.eval()
    for a, b in zip(*gradients, strict=True):
        close(a, b)


def test_a_new_model_has_the_papers_initial_values():
    config = XLSTMBlocksConfig(
        **{"pattern": "Mms", "vocab_size": 70, "hidden_size": 64, "num_heads": 4},
        **{"qk_dim": 32, "v_dim": 64, "ffn_dim": 128, "up_dim": 128, "slstm_ffn_dim": 128},
    )
    model = modeling.XLSTMBlocksForCausalLM(config)
    seven, classic, scalar = (layer.mixer for layer in model.model.layers)
    assert seven.fgate.bias.tolist() == [3, 4, 5, 6]
    assert not seven.fgate.weight.any() and not classic.igate.weight.any()
    assert (seven.igate.bias == -10).all() and classic.igate.bias.abs().max() < 1
    assert scalar.bias[1, 0, 0] == 5 and scalar.bias[1, 0, -1] == -7
    assert not scalar.recurrent_weight.any() and not scalar.bias[0].any()
    narrow = 2 / (3 * 8)
    assert model.model.layers[0].ffn.down_proj.weight.std().item() == pytest.approx(narrow, rel=0.1)
    assert classic.up_proj.weight.std().item() == pytest.approx((2 / 320) ** 0.5, rel=0.1)


def test_an_unknown_letter_is_one_message():
    with pytest.raises(ValueError, match="'x' is not a block"):
        modeling.XLSTMBlocksForCausalLM(XLSTMBlocksConfig(pattern="Mx"))
