"""The mLSTM's state across ranks: against the step recurrence over the whole row, and counted."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from benchmarks.counting.context_costs import state_costs
from benchmarks.counting.saved_memory import count_saved
from pretrain import layout as layouts
from tests.dist import work
from xlstm_kernels import mlstm_chunkwise
from xlstm_kernels.mlstm.reference import mlstm_recurrence
from xlstm_mcore.parallel import mlstm_state
from xlstm_mcore.parallel.mlstm_state import entering_state, gathers

B, HEADS, QK, V, PER_RANK = 2, 3, 5, 11, 6
STATE = B * HEADS * QK * (V + 1)  # elements of C and n


def inputs(length):
    rng = torch.Generator().manual_seed(length)

    def randn(*shape):
        return torch.randn(B, HEADS, length, *shape, generator=rng, dtype=torch.float64)

    gates = 4 * randn(), 3 * randn() + 1
    return [randn(QK), randn(QK), randn(V), *gates], randn(V)


def boundaries_of(case, length):
    """Where documents start: the places that matter at a cut, in the first row or in both."""
    starts = torch.zeros(B, length, dtype=torch.bool)
    if case == "at_cuts":  # what arrives is dropped, by one row only
        starts[0, ::PER_RANK] = True
    elif case == "over_three_ranks":  # from the middle of the first rank into the third
        starts[0, [2, min(2 * PER_RANK + 3, length - 1)]] = True
    elif case == "scattered":
        starts = torch.rand(B, length, generator=torch.Generator().manual_seed(7)) < 0.2
    return None if case == "none" else starts


def check_case(group, case, gate, eps):
    size, rank = group.size(), group.rank()
    length = size * PER_RANK
    mine = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    whole, weight = inputs(length)
    boundaries = boundaries_of(case, length)

    leaves = [x.clone().requires_grad_() for x in whole]
    expected, _ = mlstm_recurrence(*leaves, boundaries=boundaries, gate=gate, eps=eps)
    (expected * weight).sum().backward()
    _, (_, _, m_before) = mlstm_recurrence(
        *(x[:, :, : max(1, mine.start)] for x in whole),
        boundaries=None if boundaries is None else boundaries[:, : max(1, mine.start)],
        gate=gate,
    )

    part = [x[:, :, mine].clone().requires_grad_() for x in whole]
    own = None if boundaries is None else boundaries[:, mine]
    q, k, v, i, f = part
    state = entering_state(k, v, i, f, own, group, gate=gate)
    options = {"boundaries": own, "gate": gate, "eps": eps}
    h = mlstm_chunkwise(q, k, v, i, f, state, chunk_size=4, **options)
    (h * weight[:, :, mine]).sum().backward()
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(h, expected[:, :, mine], **close)
    if rank:
        torch.testing.assert_close(state[2], m_before, **close)
    for name, x, leaf in zip("qkvif", part, leaves, strict=True):
        torch.testing.assert_close(x.grad, leaf.grad[:, :, mine], **close, msg=f"{case} {name}")

    if case == "at_cuts":  # exactly nothing goes back over a boundary
        leaf = whole[1][:, :, mine].clone().requires_grad_()
        state = entering_state(leaf, v.detach(), i.detach(), f.detach(), own, group, gate=gate)
        h = mlstm_chunkwise(q, leaf, v, i, f, state, **options)
        h[0, :, 0].sum().backward()  # its first token's own write alone
        assert torch.all(leaf.grad[0, :, 1:] == 0)


def check_all(ranks, gather_up_to):
    layout = layouts.start(work.run_config("large", layout__context=ranks))
    mlstm_state.GATHER_UP_TO, before = gather_up_to, mlstm_state.GATHER_UP_TO
    try:
        for case in ("none", "at_cuts", "over_three_ranks", "scattered"):
            check_case(layout.groups.cp, case, "exp", eps=1e-3)
        check_case(layout.groups.cp, "scattered", "sigmoid", eps=1e-3)
        return count(layout.groups.cp)
    finally:
        mlstm_state.GATHER_UP_TO = before


def count(group):
    """Bytes kept, received forward and backward, and messages sent, of one fp32 call."""
    whole, _ = inputs(PER_RANK)
    k, v, i, f = (x.float().requires_grad_() for x in whole[1:])
    got, sent = [], []

    def isend(x, **kw):
        sent.append(x.numel())
        return dist.isend(x, **kw)

    def irecv(x, **kw):
        got.append(x.numel() * x.element_size())
        return dist.irecv(x, **kw)

    def all_gather_into_tensor(out, x, **kw):
        got.append((out.numel() - x.numel()) * x.element_size())
        return dist.all_gather_into_tensor(out, x, **kw)

    mlstm_state.dist = SimpleNamespace(
        isend=isend, irecv=irecv, all_gather_into_tensor=all_gather_into_tensor
    )
    try:
        with count_saved((k, v, i, f)) as saved:
            C, n, _ = entering_state(k, v, i, f, None, group, gate="exp")
        kept = saved.bytes - B * HEADS * PER_RANK * 8  # what a CPU's log sigmoid keeps
        forward = sum(got), len(sent)
        (C.sum() + n.sum()).backward()
    finally:
        mlstm_state.dist = dist
    return kept, forward, (sum(got) - forward[0], len(sent) - forward[1])


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_pipeline_equals_the_recurrence_and_moves_one_state(pool, monkeypatch, ranks):
    """The number of ranks changes nothing: a rank in the middle receives one state, sends one."""
    counts = pool(ranks, check_all, ranks, 1)
    m = B * HEADS
    messages = 1 + 6  # n and m, then 11 columns two at a time
    for rank, (_, forward, backward) in enumerate(counts):
        first, last = rank == 0, rank == ranks - 1
        assert forward == (0 if first else 4 * (STATE + m), 0 if last else messages)
        assert backward == (0 if last else 4 * STATE, 0 if first else messages)
    monkeypatch.setattr(mlstm_state, "GATHER_UP_TO", 1)
    costs = state_costs(B * HEADS, QK, V, PER_RANK, ranks)
    assert costs.messages == 2 * (ranks - 2 + messages)  # to the last rank, one after the other
    assert costs.received == 4 * (2 * STATE + m)
    assert {kept for kept, _, _ in counts} == {costs.kept}


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_gather_equals_the_recurrence_and_moves_the_others_states(pool, ranks):
    costs = state_costs(B * HEADS, QK, V, PER_RANK, ranks)
    for kept, forward, backward in pool(ranks, check_all, ranks, 8):
        assert forward[0] + backward[0] == costs.received
        assert backward == (4 * (ranks - 1) * STATE, 0)
        assert kept == costs.kept


def test_one_rule_decides():
    assert [ranks for ranks in (2, 4, 8, 9, 16, 256) if gathers(ranks)] == [2, 4, 8]


def test_bytes_grow_neither_with_the_sequence_nor_with_the_ranks():
    received = {state_costs(8, 256, 512, s, c).received for s in (512, 8192) for c in (16, 256)}
    assert received == {4 * (2 * 8 * 256 * 513 + 8)}


def test_gates_of_a_slice_are_summed_without_what_cuda_refuses_in_deterministic_mode(monkeypatch):
    *_, igate, fgate = inputs(300)[0]
    boundaries = boundaries_of("scattered", 300)
    expected = mlstm_state._slice_gates(igate, fgate, boundaries, True)
    cumsum = torch.Tensor.cumsum

    def integers_only(x, *arguments, **options):
        assert not x.is_floating_point()
        return cumsum(x, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "cumsum", integers_only)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    got = mlstm_state._slice_gates(igate, fgate, boundaries, True)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-10)
