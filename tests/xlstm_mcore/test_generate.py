"""Batches of prompts of unequal length write what each prompt writes alone."""

import random

import numpy as np
import pytest
import torch

from tests.dist.work import PlainTokenizer
from tests.xlstm_mcore.test_generation_state import make_model
from xlstm_mcore.generation import generate as generation
from xlstm_mcore.generation.generate import begun_stop, generate, pad_in_front
from xlstm_mcore.generation.sampling import Draws, pick
from xlstm_mcore.generation.settings import Sampling

PATTERNS = ["M", "m", "s", "*", "Mms*"]


def prompts_of(count, longest, seed=0):
    rng = random.Random(seed)
    return [
        " ".join(str(rng.randrange(96)) for _ in range(rng.randint(1, longest)))
        for _ in range(count)
    ]


def tokens_of(model, prompts, sampling, **options):
    done = generate(model, PlainTokenizer(), prompts, sampling, **options)
    return [one.tokens for one in done]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_in_front_changes_no_logit(pattern):
    model = make_model(pattern)
    prompts = [PlainTokenizer.prompt_ids(text) for text in prompts_of(7, 60)]
    tokens, boundaries = pad_in_front(prompts)
    assert boundaries.sum() == 7 and tokens.shape[1] == max(map(len, prompts))
    with torch.no_grad():
        together = model(tokens, boundaries, cache={}, last_only=True)[:, -1]
        scale = 5 / together.abs().max()
        for row, ids in enumerate(prompts):
            alone = model(torch.tensor([ids]), cache={}, last_only=True)[0, -1]
            assert (together[row] - alone).abs().max() * scale < 1e-5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_batch_writes_what_each_prompt_writes_alone(pattern):
    model = make_model(pattern)
    prompts = prompts_of(9, 40)
    greedy = Sampling(max_tokens=12, temperature=0)
    alone = [tokens_of(model, [text], greedy)[0] for text in prompts]
    assert len(set(alone)) > 5
    assert tokens_of(model, prompts, greedy) == alone


def test_two_hundred_prompts_write_the_same_in_any_batch():
    model = make_model("Mms*")
    prompts = prompts_of(200, 300)
    greedy = Sampling(max_tokens=4, temperature=0)
    alone = [tokens_of(model, [text], greedy)[0] for text in prompts]
    assert tokens_of(model, prompts, greedy, batch=32) == alone


def test_samples_depend_on_seed_prompt_and_sample_alone(monkeypatch):
    model = make_model("Mms*")
    prompts = prompts_of(6, 30)
    sampling = Sampling(max_tokens=8, temperature=1.1, top_k=40, top_p=0.95, num_samples=3, seed=4)
    expected = tokens_of(model, prompts, sampling)
    assert len(set(expected)) == 18
    for batch in (1, 4, 18):
        assert tokens_of(model, prompts, sampling, batch=batch) == expected
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 20)
    assert tokens_of(model, prompts, sampling) == expected
    order = [3, 0, 5]
    some = tokens_of(model, [prompts[n] for n in order], sampling, numbers=order)
    assert some == [tokens for n in order for tokens in expected[3 * n : 3 * n + 3]]
    other = Sampling(max_tokens=8, temperature=1.1, top_k=40, top_p=0.95, num_samples=3, seed=5)
    assert not set(tokens_of(model, prompts, other)) & set(expected)


def test_rows_that_end_leave_the_batch(monkeypatch):
    model = make_model("ms*")
    prompts = prompts_of(6, 20)
    greedy = Sampling(max_tokens=10, temperature=0)
    whole = tokens_of(model, prompts, greedy)
    end = whole[0][4]
    monkeypatch.setattr(PlainTokenizer, "eos_id", end)
    widths = []
    forward = model.forward

    def counted(tokens, *args, **options):
        widths.append(len(tokens))
        return forward(tokens, *args, **options)

    monkeypatch.setattr(model, "forward", counted)
    done = generate(model, PlainTokenizer(), prompts, greedy)
    for one, tokens in zip(done, whole, strict=True):
        until = tokens.index(end) if end in tokens else len(tokens)
        assert one.tokens == tokens[:until]
        assert one.ended_by == ("end" if end in tokens else "length")
    assert widths == sorted(widths, reverse=True) and widths[-1] < 6


def test_stop_texts_end_a_completion_before_them():
    model = make_model("M")
    greedy = Sampling(max_tokens=10, temperature=0)
    shown = []
    (whole,) = generate(model, PlainTokenizer(), ["5 6 7"], greedy, on_text=shown.append)
    assert "".join(shown) == whole.text and len(shown) == 10
    words = whole.text.split(" ")
    stop = f"{words[3]} {words[4]} {words[5][0]}"
    place = whole.text.index(stop)
    stopping = Sampling(max_tokens=10, temperature=0, stop=("never", stop))
    shown = []
    (one,) = generate(model, PlainTokenizer(), ["5 6 7"], stopping, on_text=shown.append)
    assert (one.text, one.ended_by) == (whole.text[:place], "stop")
    assert "".join(shown) == one.text, "no part of a stop text is ever shown"
    assert one.tokens == whole.tokens[: len(one.tokens)] and len(one.tokens) < 10
    assert begun_stop("ab<", ["<end>", "b<x"]) == 2 and begun_stop("ab", ["<end>"]) == 0


def test_tokens_are_drawn_from_the_distribution_that_was_asked_for():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])
    count = 20_000

    def shares(sampling):
        draws = [Draws(1, n, 0) for n in range(count)]
        picked = pick(logits.expand(count, -1), draws, sampling)
        return torch.bincount(picked, minlength=5) / count

    def close(found, expected):
        return torch.allclose(found.double(), expected.double(), rtol=0, atol=0.015)

    plain = logits.softmax(-1)
    assert close(shares(Sampling(temperature=1, top_k=0)), plain)
    assert close(shares(Sampling(temperature=0.5, top_k=0)), (2 * logits).softmax(-1))
    best = torch.tensor([1.0, 0, 0, 0, 1])
    assert close(shares(Sampling(temperature=1, top_k=2)), plain * best / (plain * best).sum())
    three = torch.tensor([1.0, 1, 0, 0, 1])  # the two likeliest have 0.73 together
    assert close(
        shares(Sampling(temperature=1, top_k=0, top_p=0.8)), plain * three / (plain * three).sum()
    )
    assert shares(Sampling(temperature=1, top_k=0, top_p=1e-9))[0] == 1
    assert shares(Sampling(temperature=0))[0] == 1


def test_rounding_of_logits_hardly_ever_changes_a_draw():
    """Ids in order, not by probability: two nearly equal tokens that swap places change nothing."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(500, 1000))).float()
    logits[:, 1] = logits[:, 0]
    noise = torch.from_numpy(rng.normal(size=(500, 1000))).float() * 1e-6
    sampling = Sampling(temperature=1, top_k=50)
    draws = [[Draws(0, n, 0) for n in range(500)] for _ in range(2)]
    assert torch.equal(pick(logits, draws[0], sampling), pick(logits + noise, draws[1], sampling))
