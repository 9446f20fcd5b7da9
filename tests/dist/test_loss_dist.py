"""The vocabulary-parallel loss over 2 and 4 ranks, in fp64."""

import pytest
import torch
import torch.nn.functional as F

from pretrain import layout as layouts
from tests.dist import work
from xlstm_mcore.modules.loss import linear_cross_entropy, vocab_parallel_cross_entropy


def shard_loss(ranks, cap):
    group = layouts.start(work.run_config("large", layout__tensor=ranks)).groups.tp
    rng = torch.Generator().manual_seed(0)
    values = 5 * torch.randn(9, 2, 4 * 13, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, 4 * 13, (9, 2), generator=rng)
    whole = values.clone().requires_grad_()
    y = whole if cap is None else cap * torch.tanh(whole / cap)
    expected = F.cross_entropy(y.flatten(0, 1), labels.flatten(), reduction="none").view(9, 2)
    expected.square().sum().backward()

    leaf = values.chunk(ranks, dim=-1)[group.rank()].clone().requires_grad_()
    got = vocab_parallel_cross_entropy(leaf.clone(), labels, cap, group)
    got.square().sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    mine = whole.grad.chunk(ranks, dim=-1)[group.rank()]
    torch.testing.assert_close(leaf.grad, mine, rtol=1e-12, atol=1e-12)


def shard_head(ranks, cap):
    group = layouts.start(work.run_config("large", layout__tensor=ranks)).groups.tp
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 2, 6, generator=rng, dtype=torch.float64).requires_grad_()
    weight = 2 * torch.randn(4 * 13, 6, generator=rng, dtype=torch.float64)
    whole, labels = weight.requires_grad_(), torch.randint(0, 4 * 13, (9, 2), generator=rng)
    logits = hidden @ whole.t()
    y = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = F.cross_entropy(y.flatten(0, 1), labels.flatten(), reduction="none").view(9, 2)
    expected.square().sum().backward()

    mine = whole.detach().chunk(ranks)[group.rank()].clone().requires_grad_()
    leaf = hidden.detach().clone().requires_grad_()
    got = linear_cross_entropy(leaf, mine, labels, cap, group, 5 * 18 * 8)  # 5 columns at a time
    got.square().sum().backward()
    torch.distributed.all_reduce(leaf.grad, group=group)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(leaf.grad, hidden.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        mine.grad, whole.grad.chunk(ranks)[group.rank()], rtol=1e-12, atol=1e-12
    )


def shard_padding(ranks, tokens):
    """Padding may begin in any rank's columns, and fill the last ones' altogether."""
    group = layouts.start(work.run_config("large", layout__tensor=ranks)).groups.tp
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 2, 6, generator=rng, dtype=torch.float64).requires_grad_()
    whole = (2 * torch.randn(4 * 13, 6, generator=rng, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, tokens, (9, 2), generator=rng)
    y = 30.0 * torch.tanh(hidden @ whole[:tokens].t() / 30.0)
    expected = F.cross_entropy(y.flatten(0, 1), labels.flatten(), reduction="none").view(9, 2)
    expected.square().sum().backward()
    for way in ("logits", "none"):
        mine = whole.detach().chunk(ranks)[group.rank()].clone().requires_grad_()
        leaf = hidden.detach().clone().requires_grad_()
        if way == "logits":
            got = vocab_parallel_cross_entropy(leaf @ mine.t(), labels, 30.0, group, tokens)
        else:
            got = linear_cross_entropy(leaf, mine, labels, 30.0, group, 5 * 18 * 8, tokens)
        got.square().sum().backward()
        torch.distributed.all_reduce(leaf.grad, group=group)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(leaf.grad, hidden.grad, rtol=1e-12, atol=1e-12)
        wanted = whole.grad.chunk(ranks)[group.rank()]
        torch.testing.assert_close(mine.grad, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "tokens"), [(2, 40), (2, 20), (4, 13), (4, 51)])
def test_padding_over_ranks_gets_no_logit(pool, ranks, tokens):
    pool(ranks, shard_padding, ranks, tokens)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_head_and_loss_over_ranks(pool, ranks, cap):
    pool(ranks, shard_head, ranks, cap)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_loss_over_ranks(pool, ranks, cap):
    pool(ranks, shard_loss, ranks, cap)
