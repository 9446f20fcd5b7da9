"""Attention: documents and gradients, grouped heads, the cache, and what it keeps in memory.

The equations are compared in test_model.py, layouts in tests/dist/test_parallel.py.
"""

import itertools

import pytest
import torch

from xlstm_mcore.build import make_config
from xlstm_mcore.inference import single_process_groups
from xlstm_mcore.mixers.attention import (
    AttentionMixer,
    attend,
    document_lengths,
    document_starts,
    know_documents,
    rotary_angles,
    rotate,
)
from xlstm_mcore.mixers.attention_span import Span, visible


@pytest.fixture(scope="module", autouse=True)
def groups():
    return single_process_groups()


def make(groups, dtype=torch.float64, **keys):
    config = make_config(
        {
            "pattern": "*",
            "hidden_size": 24,
            "num_heads": 4,
            "attention_kv_heads": 2,
            "vocab_size": 8,
            **keys,
        }
    )
    config.params_dtype = dtype
    mixer = AttentionMixer(config, groups, "decoder.layers.0.mixer.")
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / 3)
    return BySequence(mixer)


class BySequence(torch.nn.Module):
    """A mixer that is called with `[s, b, h]`."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x, *rest):
        return self.mixer(x.flatten(0, 1), x.shape[1], *rest).view(x.shape)


ROWS = [[0, 5, 6, 17], [0, 11]]  # first tokens of the documents of two rows of 20


def boundaries_of(rows, length):
    marks = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, starts in enumerate(rows):
        marks[row, starts] = True
    return marks


def test_a_packed_row_equals_its_documents_in_values_and_gradients(groups):
    mixer = make(groups)
    x = torch.randn(20, 2, 24, dtype=torch.float64)
    weight = torch.randn(20, 2, 24, dtype=torch.float64)
    packed = x.clone().requires_grad_()
    out = mixer(packed, boundaries_of(ROWS, 20))
    (out * weight).sum().backward()
    gradients = [p.grad.clone() for p in mixer.parameters()]
    mixer.zero_grad()
    apart = x.clone().requires_grad_()
    for row, starts in enumerate(ROWS):
        for first, last in zip(starts, [*starts[1:], 20], strict=True):
            alone = mixer(apart[first:last, row : row + 1], None)
            torch.testing.assert_close(out[first:last, row : row + 1], alone, rtol=0, atol=1e-13)
            (alone * weight[first:last, row : row + 1]).sum().backward()
    torch.testing.assert_close(packed.grad, apart.grad, rtol=0, atol=1e-12)
    for got, parameter in zip(gradients, mixer.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=0, atol=1e-12)


def test_nothing_passes_a_boundary(groups):
    mixer = make(groups)
    x = torch.randn(9, 1, 24, dtype=torch.float64, requires_grad=True)
    mixer(x, boundaries_of([[4]], 9))[6].sum().backward()
    assert not x.grad[:4].any() and not x.grad[7:].any()
    assert x.grad[4:7].abs().sum(-1).all()


WINDOWS = [(1, 0), (1, 3), (2, 1), (4, 0), (3, 5), (30, 2)]


@pytest.mark.parametrize("steps", [(20,), (1,) * 20, (7, 1, 12), (1, 19), (9, 2, 1, 8)])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), *WINDOWS])
def test_a_cache_may_be_fed_in_any_portions_with_boundaries(groups, steps, window, sinks):
    """Rows whose documents begin at different places, as with padded prompts."""
    mixer = make(groups, attention_window=window, attention_sinks=sinks)
    x, marks = torch.randn(20, 2, 24, dtype=torch.float64), boundaries_of(ROWS, 20)
    with torch.no_grad():
        whole = mixer(x, marks)
        cache, done, parts = {}, 0, []
        for n in steps:
            here = marks[:, done : done + n]
            parts.append(mixer(x[done : done + n], here if here.any() else None, cache))
            done += n
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-13)
    assert cache["length"] == 20
    if window is None:
        assert cache["k"][:, :, :20].shape == (2, 2, 20, 6)
    else:
        assert cache["length"] - cache["first"] < 2 * window


@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
@pytest.mark.parametrize("length", [1, 2, 7, 12, 13])
def test_a_window_equals_a_mask_over_all_pairs(window, sinks, length):
    q = torch.randn(2, length, 6, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, length, 2, 4, dtype=torch.float64, requires_grad=True) for _ in "kv")
    weight = torch.randn(2, length, 6, 4, dtype=torch.float64)
    place = torch.arange(length)
    seen = place[:, None] - place
    seen = (seen >= 0) & ((seen < window) | (place < sinks))
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(3, dim=2)) / 2
    chance = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    want = torch.einsum("bhij,bjhd->bihd", chance, v.repeat_interleave(3, dim=2))
    got = attend(q, k, v, None, Span(window, sinks))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (got, want)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_what_a_token_sees_is_counted_from_the_start_of_its_document():
    key = torch.arange(12)
    seen = visible(torch.tensor(9), key, torch.tensor(2), Span(3, 2))
    assert key[seen].tolist() == [2, 3, 7, 8, 9]


def test_a_cache_with_a_window_never_grows(groups):
    mixer = make(groups, attention_window=4, attention_sinks=2)
    cache, rooms = {"capacity": 1000}, set()
    with torch.no_grad():
        for tokens in (1, *[1] * 40, 30, *[1] * 20):
            mixer(torch.randn(tokens, 1, 24, dtype=torch.float64), None, cache)
            rooms.add(cache["k"].shape[2])
    assert rooms == {2 + 2 * 4}


def test_a_cache_of_known_capacity_is_never_moved(groups):
    mixer = make(groups)
    cache = {"capacity": 20}
    with torch.no_grad():
        mixer(torch.randn(7, 2, 24, dtype=torch.float64), None, cache)
        places = cache["k"].data_ptr(), cache["v"].data_ptr()
        for _ in range(13):
            mixer(torch.randn(1, 2, 24, dtype=torch.float64), None, cache)
        assert (cache["k"].data_ptr(), cache["v"].data_ptr()) == places
        assert cache["k"].shape == (2, 2, 20, 6)
        mixer(torch.randn(1, 2, 24, dtype=torch.float64), None, cache)
    assert cache["length"] == 21 and cache["k"].shape[2] == 40, "then it doubles"


def test_no_square_matrix_is_kept_or_made(groups):
    """Memory stays linear in the row's length, with and without boundaries and a window."""
    whole = make(groups, torch.float32)
    windows = make(groups, torch.float32, attention_window=16, attention_sinks=2)
    length = 512
    for mixer, boundaries in itertools.product(
        (whole, windows), (None, boundaries_of([[3, 100]], length))
    ):
        largest = 0

        def note(t):
            nonlocal largest
            largest = max(largest, t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            mixer(torch.randn(length, 1, 24, requires_grad=True), boundaries)
        assert 0 < largest < length * length / 4


def test_lengths_and_starts():
    marks = torch.tensor([[False, False, True, False], [True, True, False, False]])
    assert document_lengths(marks) == [2, 2, 1, 3]
    x = torch.zeros(2, 4)
    assert document_starts(x, marks, 0, None).tolist() == [[0, 0, 2, 2], [0, 1, 1, 1]]
    later = document_starts(x, marks, 10, torch.tensor([3, 7]))
    assert later.tolist() == [[3, 3, 12, 12], [10, 11, 11, 11]]


def test_rotation_depends_on_distance_alone_even_far_out():
    rng = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=rng, dtype=torch.float64)

    def score(at, other):
        return (
            rotate(q, rotary_angles(torch.tensor([[at]]), 16, 1e4))
            * rotate(k, rotary_angles(torch.tensor([[other]]), 16, 1e4))
        ).sum()

    assert abs(score(5, 2) - score(1_000_005, 1_000_002)) < 1e-8
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_grouped_heads_equal_repeated_ones():
    q = torch.randn(2, 7, 6, 4, dtype=torch.float64)
    k, v = torch.randn(2, 2, 7, 2, 4, dtype=torch.float64)
    whole = attend(q, k.repeat_interleave(3, dim=2), v.repeat_interleave(3, dim=2), None)
    torch.testing.assert_close(attend(q, k, v, None), whole)


def test_no_layer_asks_the_device_for_documents_that_are_known(monkeypatch):
    on_device = boundaries_of(ROWS, 20)
    know_documents(on_device, on_device.clone())
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda x: pytest.fail("asked the device"))
    assert document_lengths(on_device) == [5, 1, 11, 3, 11, 9]
    with pytest.raises(pytest.fail.Exception):
        document_lengths(on_device.clone())
