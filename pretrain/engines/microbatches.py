"""What all engines share: this rank's model chunks, and Megatron's schedules that drive them."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from pretrain.config import RunConfig
from pretrain.data import Batch
from pretrain.engines.base import LossSum
from pretrain.layout import Layout
from xlstm_mcore.build import build_model, make_config
from xlstm_mcore.parameters.decay import decays
from xlstm_mcore.parameters.slices import named_slices


class ScheduledEngine:
    """A model on this run's layout under Megatron's schedules; engines add the optimizer.

    Args:
        config: the run.
        layout: the process layout the run was started on.

    Attributes:
        models: this rank's model chunks (several with interleaved stages).
        chunks: what the schedule calls for each of them: the models, or an engine's wrappers.
        num_parameters: parameters of the whole model.
    """

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.model_config = make_config(
            config.model,
            layout=config.layout,
            memory=config.memory,
            precision=config.engine.precision,
            backend=layout.backend,
            deterministic=config.run.deterministic,
        )
        self.models = build_model(
            self.model_config, layout.groups, config.run.seed, self._finish_part
        )
        for model in self.models:
            for _, parameter, slices in named_slices(model):
                parameter.no_weight_decay = not decays(slices[0].name, config.optimizer.decay)
        self.chunks: list[nn.Module] = list(self.models)
        self.num_parameters = self._count_parameters()
        self._forward_backward = get_forward_backward_func()

    def _finish_part(self, part: nn.Module) -> None:
        """Called with an embedding, layer or head that has its initial values; see build_model."""

    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        """Loss over this replica's batches without gradients, summed over all replicas."""
        for chunk in self.chunks:
            chunk.eval()
        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                loss = self._run([batch], forward_only=True)
                total, tokens = total + loss.total, tokens + loss.tokens
        return LossSum(total, tokens)

    def _run(self, batches: list[Batch], forward_only: bool, loss_scale: float = 1.0) -> LossSum:
        """Run the schedule over this replica's micro-batches.

        Args:
            batches: the micro-batches.
            forward_only: no backward passes.
            loss_scale: what the sum of token losses is multiplied by before the backward pass.

        Returns:
            The loss over all replicas, unscaled.
        """
        several = len(self.chunks) > 1
        iterators: Any = [iter(batches) for _ in self.chunks]
        losses = self._forward_backward(
            forward_step_func=lambda batch, model: self._forward_step(batch, model, loss_scale),
            data_iterator=iterators if several else iterators[0],
            model=self.chunks if several else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=self.config.data.seq_len,
            micro_batch_size=self.config.data.micro_batch,
            forward_only=forward_only,
            pg_collection=None,
        )
        return self._sum_losses([loss["sums"] for loss in losses])

    def _sum_losses(self, losses: list[Tensor]) -> LossSum:
        """Add up (loss, tokens) pairs of micro-batches over the whole layout."""
        # Only the last stage has losses, the same ones on all its tensor-parallel ranks; each
        # context-parallel rank has those of its slice of the sequence.
        total = torch.zeros(2, dtype=torch.float64, device=self.layout.device)
        for loss in losses:
            total += loss
        groups = self.layout.groups
        torch.distributed.all_reduce(total, group=groups.dp_cp)
        torch.distributed.all_reduce(total, group=groups.pp)
        return LossSum(total[0].item(), int(total[1].item()))

    def _forward_step(
        self, iterator: Iterator[Batch], model: nn.Module, loss_scale: float
    ) -> tuple[Tensor, Callable]:
        context = self.layout.groups.cp
        batch = next(iterator).context_slice(context.rank(), context.size()).to(self.layout.device)
        output = model(batch.tokens, batch.boundaries, batch.labels)

        def loss_function(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            """Summed loss, number of tokens, and both for the log (Megatron's convention)."""
            total = (losses * batch.loss_mask).sum()
            tokens = batch.loss_mask.sum()
            sums = torch.stack((total.detach(), tokens)).double()
            return total * loss_scale, tokens.int(), {"sums": sums}

        return output, loss_function

    def _count_parameters(self) -> int:
        """Parameters of the whole model, counted from what all ranks hold."""
        mine = sum(
            math.prod(part.shape)
            for model in self.models
            for _, parameter, slices in named_slices(model)
            for part in slices
            if self._is_owner(parameter)
        )
        count = torch.tensor(mine, dtype=torch.int64, device=self.layout.device)
        torch.distributed.all_reduce(count)
        return count.item() // self.layout.groups.dp_cp.size()

    def _is_owner(self, parameter: Tensor) -> bool:
        """Whether this rank's copy is the one that counts among tensor-parallel and tied ones."""
        if getattr(parameter, "shared", False):
            return False  # the last stage's copy of a tied embedding
        return parameter.tensor_model_parallel or self.layout.groups.tp.rank() == 0
