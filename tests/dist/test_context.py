"""Ways across the cuts of context parallelism, each against the whole sequence in one process."""

import pytest
import torch

from pretrain import layout as layouts
from tests.dist import work
from xlstm_mcore.build import make_config
from xlstm_mcore.parallel.context import ContextParallel
from xlstm_mcore.parallel.tensor import TensorParallelRegion


def heads_and_back(tensor, sequence, middle):
    """to_heads and from_heads over TP x CP, values and gradients, on inputs of awkward strides."""
    shape = {"layout__tensor": tensor, "layout__sequence": sequence, "layout__context": 2}
    config = work.run_config("classic", **shape)
    groups = layouts.start(config).groups
    model = make_config(config.model, layout={"tensor": tensor, "sequence": sequence, "context": 2})
    region, context = TensorParallelRegion(model, groups.tp), ContextParallel(groups.cp)
    rng = torch.Generator().manual_seed(0)
    full = torch.randn(8, 3, *middle, 24, generator=rng)
    weight = torch.randn(8, 3, *middle, 24, generator=rng)

    rows = 8 // (2 * (tensor if sequence else 1))
    first = rows * (groups.cp.rank() * (tensor if sequence else 1))
    first += rows * groups.tp.rank() if sequence else 0
    rows = slice(first, first + rows)
    width = 24 // (2 * tensor)  # a tensor-parallel rank's heads, and of those this rank's half
    first = width * (2 * groups.tp.rank() + groups.cp.rank())
    columns = slice(first, first + width)

    mine = full[rows].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    heads = context.to_heads(region.to_heads(mine) if tensor > 1 else mine)
    assert torch.equal(heads, full[..., columns])
    (heads * weight[..., columns]).sum().backward()
    assert torch.equal(mine.grad, weight[rows])

    other = full[..., columns].clone().requires_grad_()
    back = context.from_heads(other.transpose(0, 1).contiguous().transpose(0, 1))
    back = region.from_heads(back) if tensor > 1 else back
    assert torch.equal(back, full[rows])
    (back * weight[rows]).sum().backward()
    assert torch.equal(other.grad, weight[..., columns])
    return True


@pytest.mark.dist
@pytest.mark.parametrize(
    ("tensor", "sequence", "middle"), [(1, False, ()), (1, False, (5,)), (2, True, ())]
)
def test_heads_and_sequence_change_places_exactly(pool, tensor, sequence, middle):
    ranks = 2 * tensor
    assert pool(ranks, heads_and_back, tensor, sequence, middle) == [True] * ranks


def draw(config):
    groups = layouts.start(config).groups
    return groups.cp.rank(), torch.rand(8)


@pytest.mark.dist
def test_dropout_masks_differ_over_context_ranks_only(pool):
    config = work.run_config("large", layout__context=2, layout__tensor=2)
    numbers = dict(pool(4, draw, config))
    for rank, drawn in pool(4, draw, config):
        assert torch.equal(drawn, numbers[rank])
    assert not torch.equal(numbers[0], numbers[1])


def break_one(name):
    """Take one sum away; returns how to give it back."""
    from xlstm_mcore.parallel import context as context_parallel
    from xlstm_mcore.parallel import mlstm_state

    state, before = mlstm_state._EnteringState, context_parallel._FromRankBefore
    owner, attribute, broken = {
        "halo gradient": (before, "backward", lambda ctx, d: (torch.zeros_like(d), None)),
        "state gradient": (state, "backward", lambda ctx, *d: (None,) * 6),
        "decay gradient": (
            state,
            "backward",
            lambda ctx, *d, whole=state.backward: (*whole(ctx, *d)[:3], None, None, None),
        ),
        "sum of losses": (work, "make_config", mean_of_means),
    }[name]
    original = owner.__dict__[attribute]
    setattr(owner, attribute, staticmethod(broken) if owner in (state, before) else broken)
    return lambda: setattr(owner, attribute, original)


def mean_of_means(*args, **kwargs):
    """Each rank's own mean, as megatron-core has it by default."""
    config = make_config(*args, **kwargs)
    config.calculate_per_token_loss = False
    return config


def broken_gradients(config, name):
    mend = break_one(name)
    try:
        return work.fp64_gradients(config)
    finally:
        mend()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("halo gradient", 2),
        ("state gradient", 2),
        # only a slice with others on both sides has a state to decay and passes one on
        ("decay gradient", 4),
        ("sum of losses", 2),
    ],
)
def test_each_sum_over_the_cuts_is_needed(pool, name, ranks):
    """Nothing fails without it, only the gradient is wrong."""
    ((_, chunks),) = pool(1, work.fp64_gradients, work.run_config("classic"))
    expected = work.assemble([chunks])
    config = work.run_config("classic", layout__context=ranks)
    answers = pool(ranks, broken_gradients, config, name)
    got = work.assemble([chunks for _, chunks in answers])
    error = max((got[key] - expected[key]).abs().max() for key in expected)
    assert error > 1e-6
