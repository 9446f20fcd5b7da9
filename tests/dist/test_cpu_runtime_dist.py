"""Cures of the CPU runtime that need several processes."""

import pytest
import torch
import torch.distributed as dist

from pretrain import layout as layouts
from tests.dist import work

TP2 = {"layout__tensor": 2, "layout__sequence": True}
VPP = {"layout__pipeline": 2, "layout__virtual": 2}


def gather_without_stand_in():
    """Sequence-parallel gather with megatron-core's own idea of the device."""
    from megatron.core.tensor_parallel import mappings

    layout = layouts.start(work.run_config("large", **TP2))
    stand_in, mappings.torch = mappings.torch, torch
    try:
        mappings.gather_from_sequence_parallel_region(torch.ones(2, 1, 4), group=layout.groups.tp)
    except (AssertionError, RuntimeError) as error:
        return type(error).__name__
    finally:
        mappings.torch = stand_in
    return None


@pytest.mark.dist
def test_stand_in_is_needed_for_sequence_parallelism(pool):
    assert all(pool(2, gather_without_stand_in))


def train_with_batched_messages(config):
    """Pipeline settings as megatron-core has them by default."""
    from xlstm_mcore.megatron import cpu_runtime

    original = cpu_runtime.pipeline_settings
    whole = {"deallocate_pipeline_outputs": False}  # of what megatron-core has, the batches alone
    cpu_runtime.pipeline_settings = lambda *_: original("nccl") | whole
    try:
        return work.train(config, 1)[0]
    finally:
        cpu_runtime.pipeline_settings = original


@pytest.mark.dist
def test_batched_messages_give_wrong_gradients_on_gloo(pool):
    """No error, only a wrong gradient: the reason for cpu_runtime.pipeline_settings."""
    ((expected, _),) = pool(1, work.train, work.run_config("large_deep"), 1)
    config = work.run_config("large_deep", **VPP)
    right, _ = pool(2, work.train, config, 1)[0]
    wrong = pool(2, train_with_batched_messages, config)[0]
    assert right[0][1] == pytest.approx(expected[0][1], rel=1e-5)
    assert wrong[0][1] != pytest.approx(expected[0][1], rel=1e-2)


def all_to_all_gradients():
    """to_heads and from_heads on inputs of any strides, against gathering everything."""
    from xlstm_mcore.build import make_config
    from xlstm_mcore.parallel.tensor import TensorParallelRegion

    config = work.run_config("classic", **TP2)
    layout = layouts.start(config)
    region = TensorParallelRegion(
        make_config(config.model, layout={"tensor": 2, "sequence": True}), layout.groups.tp
    )
    rng = torch.Generator().manual_seed(0)
    full = torch.randn(8, 3, 12, generator=rng)  # [s, b, h]
    weight = torch.randn(8, 3, 12, generator=rng)
    rank = layout.groups.tp.rank()
    rows, columns = slice(4 * rank, 4 * rank + 4), slice(6 * rank, 6 * rank + 6)

    # a transposed, that is non-contiguous, view
    mine = full[rows].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    heads = region.to_heads(mine)
    assert torch.equal(heads, full[:, :, columns])
    (heads * weight[:, :, columns]).sum().backward()
    assert torch.equal(mine.grad, weight[rows])

    other = full[:, :, columns].clone().requires_grad_()
    back = region.from_heads(other.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(back, full[rows])
    (back * weight[rows]).sum().backward()
    assert torch.equal(other.grad, weight[:, :, columns])
    dist.barrier()
    return True


@pytest.mark.dist
def test_all_to_all_is_exact_for_any_strides(pool):
    assert pool(2, all_to_all_gradients) == [True, True]
