"""The likeliest next tokens of a few texts, on any layout, by plain forward passes.

Generation with carried state needs the whole model on one tensor-parallel group. Here the model
stays as it is spread for training, and every new token costs a forward pass over the short texts.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core import tensor_parallel
from torch import Tensor, nn

from pretrain.data import Batch
from pretrain.engines.microbatches import run_schedule
from pretrain.layout import Layout


@torch.no_grad()
def next_tokens(
    model_chunks: Sequence[nn.Module],
    texts: Sequence[Sequence[int]],
    vocabulary: int,
    layout: Layout,
) -> list[int]:
    """The likeliest token after each text; the same on every rank.

    Args:
        model_chunks: this rank's model chunks.
        texts: ids of each text, at least one.
        vocabulary: ids that may come next.
        layout: where this process stands.
    """
    for model_chunk in model_chunks:
        model_chunk.eval()
    groups = layout.groups
    context, tensor = groups.cp, groups.tp
    cuts = context.size() * tensor.size()  # of a row, with sequence parallelism
    width = -(-max(map(len, texts)) // cuts) * cuts
    tokens = torch.zeros(len(texts), width, dtype=torch.int64)
    for line, text in zip(tokens, texts, strict=True):
        line[: len(text)] = torch.tensor(text)
    last = torch.tensor([len(text) - 1 for text in texts], device=layout.device)
    unused = torch.zeros(tokens.shape)
    batch = Batch(tokens, tokens, unused, unused.bool(), torch.zeros(len(texts), 0))
    batch = batch.context_slice(context.rank(), context.size()).to(layout.device)

    def choose(logits: Tensor) -> Tensor:
        """The likeliest tokens of the rows whose last token lies in this rank's slice, else -1."""
        place = last - context.rank() * logits.shape[1]
        inside = (place >= 0) & (place < logits.shape[1])
        rows = torch.arange(len(place), device=place.device)
        own = logits[rows, place.clamp(0, logits.shape[1] - 1)]
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(own, group=tensor)
        return torch.where(inside, whole[:, :vocabulary].argmax(1), -1)

    if groups.pp.size() == 1:
        found = [choose(model_chunks[0](batch.tokens, batch.boundaries))]
    else:
        found = _through_stages(model_chunks, batch, (len(texts), width), choose, groups.pp.size())
    chosen = found[0] if found else torch.full_like(last, -1)
    torch.distributed.all_reduce(chosen, op=torch.distributed.ReduceOp.MAX)
    return chosen.tolist()


def _through_stages(
    model_chunks: Sequence[nn.Module],
    batch: Batch,
    shape: tuple[int, int],
    choose: Callable[[Tensor], Tensor],
    stages: int,
) -> list[Tensor]:
    """What `choose` makes of the logits, on ranks of the last stage."""

    def forward_step(iterator: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Callable]:
        part = next(iterator)
        output = model(part.tokens, part.boundaries)

        def collect(logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            one = torch.ones((), device=logits.device)
            return one, one.int(), {"chosen": choose(logits)}

        return output, collect

    # The interleaved schedule takes whole groups only.
    batches = [batch] * (stages if len(model_chunks) > 1 else 1)
    found = run_schedule(model_chunks, batches, forward_step, shape, forward_only=True)
    return [one["chosen"] for one in found]
