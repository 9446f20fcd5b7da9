"""Ways across the cuts of context parallelism, each against the whole sequence in one process."""

import pytest
import torch

from pretrain import layout as layouts
from tests.dist import work
from xlstm_mcore.build import make_config
from xlstm_mcore.context_parallel import ContextParallel
from xlstm_mcore.layers import TensorParallelRegion


def heads_and_back(tensor, sequence, middle):
    """to_heads and from_heads over TP x CP, values and gradients, on inputs of awkward strides."""
    shape = {"layout__tensor": tensor, "layout__sequence": sequence, "layout__context": 2}
    config = work.run_config("classic", **shape)
    groups = layouts.start(config).groups
    model = make_config(config.model.model_dump(), tensor=tensor, sequence=sequence, context=2)
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
