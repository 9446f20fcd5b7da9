"""How the micro-batches of a global batch go through the model, and how their losses add up."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from pretrain.config import DataConfig
from pretrain.data import Batch
from pretrain.engines.base import LossSum
from pretrain.layout import Layout
from xlstm_mcore.mixers.attention import know_documents


def run_microbatches(
    model_chunks: Sequence[nn.Module],
    batches: list[Batch],
    layout: Layout,
    data: DataConfig,
    *,
    forward_only: bool,
    loss_scale: float | Tensor = 1.0,
) -> list[Tensor]:
    """Run this replica's micro-batches through the model.

    Args:
        model_chunks: this rank's model chunks, several with interleaved stages.
        batches: the micro-batches.
        layout: where this process stands.
        data: sizes of a micro-batch.
        forward_only: no backward passes.
        loss_scale: what the sum of token losses is multiplied by before the backward pass.

    Returns:
        The loss of each micro-batch, see `sum_losses`; none where this rank has no last stage.
    """

    def forward_step(iterator: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Callable]:
        return forward(model, next(iterator), layout, loss_scale)

    shape = (data.micro_batch, data.seq_len)
    losses = run_schedule(model_chunks, batches, forward_step, shape, forward_only=forward_only)
    return [loss["sums"] for loss in losses]


def run_schedule(
    model_chunks: Sequence[nn.Module],
    batches: list[Batch],
    forward_step: Callable,
    shape: tuple[int, int],
    *,
    forward_only: bool,
) -> list[dict[str, Tensor]]:
    """Run micro-batches under Megatron's pipeline schedule.

    Args:
        model_chunks: this rank's model chunks, several with interleaved stages.
        batches: the micro-batches.
        forward_step: from an iterator over them and a model chunk to the chunk's output and a
            function of it; see `forward`.
        shape: rows and tokens of a micro-batch.
        forward_only: no backward passes.

    Returns:
        What that function reports of each micro-batch; none where this rank has no last stage.
    """
    several = len(model_chunks) > 1
    iterators: Any = [iter(batches) for _ in model_chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if several else iterators[0],
        model=list(model_chunks) if several else model_chunks[0],
        num_microbatches=len(batches),
        micro_batch_size=shape[0],
        seq_length=shape[1],
        forward_only=forward_only,
        pg_collection=None,
    )


def forward(
    model: nn.Module, batch: Batch, layout: Layout, loss_scale: float | Tensor
) -> tuple[Tensor, Callable]:
    """Run one micro-batch through a model chunk.

    Returns:
        The output of the model chunk, and a function from the last one's output, which is the token
        losses, to the convention of Megatron's schedules: the scaled sum of the losses, the number
        of tokens, and both for the log.
    """
    context = layout.groups.cp
    on_host = batch.context_slice(context.rank(), context.size())
    batch = on_host.to(layout.device)
    know_documents(batch.boundaries, on_host.boundaries)
    output = model(batch.tokens, batch.boundaries, batch.labels)

    def loss_function(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = (losses * batch.loss_mask).sum()
        tokens = batch.loss_mask.sum()
        sums = torch.stack((total.detach(), tokens)).double()
        if batch.sources.shape[1]:
            sums = torch.cat((sums, _sums_of_sources(losses.detach(), batch)))
        return total * loss_scale, tokens.int(), {"sums": sums}

    return output, loss_function


def _sums_of_sources(losses: Tensor, batch: Batch) -> Tensor:
    """The sum of the unmasked tokens' losses of each source, and then the number of these tokens.

    A product with the sources of the rows is exact, and has one order of summation on every device.

    Returns:
        fp64 `[2 * sources]`.
    """
    mask = batch.loss_mask
    rows = torch.stack(((losses * mask).double().sum(1), mask.double().sum(1)))
    return (rows @ batch.sources).flatten()


def sum_losses(losses: list[Tensor], layout: Layout, sources: int) -> Tensor:
    """Add up the losses of micro-batches over the whole layout, without waiting for the device.

    Args:
        losses: fp64 `[2 + 2 * sources]` each: the sum of the unmasked tokens' losses and their
            number, then the sums of the sources, and then their numbers.
        layout: where this process stands.
        sources: how many sources are told apart.

    Returns:
        The same of the global batch.
    """
    # Only the last stage has losses, the same ones on all its tensor-parallel ranks; each
    # context-parallel rank has those of its slice of the sequence.
    total = torch.zeros(2 + 2 * sources, dtype=torch.float64, device=layout.device)
    for loss in losses:
        total += loss
    torch.distributed.all_reduce(total, group=layout.groups.dp_cp)
    torch.distributed.all_reduce(total, group=layout.groups.pp)
    return total


@torch.no_grad()
def evaluate(
    run: Callable[[list[Batch]], Tensor],
    model_chunks: Sequence[nn.Module],
    batches: Iterable[Batch],
    stages: int,
) -> LossSum:
    """Loss over this replica's batches without gradients, summed over all replicas.

    Args:
        run: runs micro-batches forward only; returns what `sum_losses` does.
        model_chunks: this rank's model chunks.
        batches: the micro-batches, as many on every replica.
        stages: pipeline-parallel size. So many micro-batches go through the model together, which
            keeps every stage at work.
    """
    for model_chunk in model_chunks:
        model_chunk.eval()
    sums: Tensor | float = 0.0
    rest = iter(batches)
    while group := list(islice(rest, stages)):
        if len(model_chunks) > 1:
            # The interleaved schedule takes whole groups only. What fills one up has no loss.
            group += [group[-1].without_loss()] * (stages - len(group))
        sums = sums + run(group)
    total, tokens = sums[:2].tolist() if isinstance(sums, Tensor) else (0.0, 0.0)
    return LossSum(total, int(tokens))
