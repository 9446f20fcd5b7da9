"""The Megatron engine: Megatron's schedules and DDP around XLSTMModel, and an optimizer."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from torch import Tensor

from pretrain.checkpoint import TensorSlice
from pretrain.config import RunConfig, support
from pretrain.data import Batch
from pretrain.engines.adamw import AdamWDistributed
from pretrain.engines.base import Held, Optimizer
from pretrain.engines.microbatches import run_microbatches
from pretrain.engines.model import ModelEngine
from pretrain.engines.muon import MuonWithAdamW
from pretrain.engines.verdict import Verdict
from pretrain.layout import Layout
from xlstm_mcore.megatron import compat

# optimizer.name -> the optimizer.
OPTIMIZERS: dict[str, type[AdamWDistributed] | type[MuonWithAdamW]] = {
    "adamw": AdamWDistributed,
    "muon": MuonWithAdamW,
}


class MegatronEngine(ModelEngine):
    """See `pretrain.engines.base.Engine`.

    Args:
        config: the run.
        layout: the process layout the run was started on.

    Attributes:
        optimizer: updates the weights from the gradients in Megatron's buffers.
    """

    has_gradient_buffers = True

    def __init__(self, config: RunConfig, layout: Layout, *, initial_values: bool = True) -> None:
        super().__init__(config, layout, initial_values=initial_values)
        make_optimizer = OPTIMIZERS[config.optimizer.name]
        overlap_gradients, self._gathers_late = support.overlaps(config, layout.backend)
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=config.engine.grad_reduce == "fp32",
            use_distributed_optimizer=make_optimizer.shares_gradients,
            overlap_grad_reduce=overlap_gradients,
            overlap_param_gather=self._gathers_late,
        )
        self.model_chunks = [
            DistributedDataParallel(
                self.model_config,
                ddp_config,
                model,
                disable_bucketing=number > 0,
                pg_collection=layout.groups,
            )
            for number, model in enumerate(self.models)
        ]
        self.optimizer: Optimizer = make_optimizer(config, layout, self.model_chunks)
        self.model_config.finalize_model_grads_func = _finalize_gradients
        if overlap_gradients:  # only the last micro-batch's backward pass may reduce them
            no_sync: Any = [model_chunk.no_sync for model_chunk in self.model_chunks]
            self.model_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self._clear_gradients()

    def forward_backward(self, batches: list[Batch]) -> Tensor:
        """Loss of one global batch; gradients stay in the buffers until `step`."""
        for model_chunk in self.model_chunks:
            model_chunk.train()
        loss = self._run(batches, forward_only=False)
        # The mean over tokens, once their number is known.
        scale = 1.0 / loss[1].clamp(min=1.0).float()
        for model_chunk in self.model_chunks:
            model_chunk.scale_gradients(scale)
        return loss

    def gradient_norm(self) -> Tensor:
        """The 2-norm of the whole gradient, a scalar on the device."""
        return self.optimizer.gradient_norm()

    def gradients(self) -> Iterator[TensorSlice]:
        """The slices of the whole gradient that this rank counts."""
        return self._counted(self.optimizer.gradients())

    def step(self, lr: float, verdict: Verdict) -> None:
        """Clip and update with learning rate `lr` if the verdict allows it; clear the gradients."""
        with self._products():
            self.optimizer.step(lr, verdict)
        self._clear_gradients()

    def sharded_state(self) -> list[TensorSlice]:
        """The slices this rank saves: every element of the state is saved by exactly one rank."""
        self._gather_weights()
        return super().sharded_state()

    def load_sharded_state(self, load: Callable[[list[TensorSlice]], Any], updates: int) -> None:
        """Fill weights, fp32 masters and optimizer state; see `ModelEngine._load_shared`.

        Args:
            load: copies a checkpoint's values into the slices it is given.
            updates: optimizer updates done so far, for Adam's bias correction.
        """
        self._gather_weights()
        with torch.no_grad():
            self._load_shared(load, [part for _, part in self._optimizer_slices()])
        self.optimizer.set_updates(updates)
        self._clear_gradients()

    def held(self) -> Iterator[Held]:
        """What this rank holds that other ranks may hold too."""
        self._gather_weights()
        return super().held()

    def held_gradients(self) -> Iterator[Held]:
        """What this rank holds of the gradient that other ranks may hold too."""
        for parameter, part in self.optimizer.gradients():
            name, split = f"gradient of {part.name}", parameter.tensor_model_parallel
            yield Held(name, part.tensor, over_data=False, over_tensor=not split)

    def close(self) -> None:
        """Free the memory of model and optimizer."""
        del self.optimizer  # weights in fp32 lead from it to DDP's hooks
        for model_chunk in self.model_chunks:
            compat.release_hooks(model_chunk)

    def _run(self, batches: list[Batch], *, forward_only: bool) -> Tensor:
        with self._products():
            losses = run_microbatches(
                self.model_chunks, batches, self.layout, self.config.data, forward_only=forward_only
            )
        return self._sum(losses, batches)

    def _optimizer_slices(self) -> Iterator[tuple[Tensor, TensorSlice]]:
        return self.optimizer.slices()

    def _spread_weights(self, owned: Sequence[tuple[Tensor, int]]) -> None:
        """An fp32 weight is its master weight, of which each rank has read a part.

        A checkpoint of bf16 weights has more digits in its masters, which the weights of an owner
        would overwrite. So the parts are gathered, as after an update.
        """
        if self.config.engine.precision == "fp32" and self.optimizer.shares_gradients:
            for model_chunk in self.model_chunks:
                model_chunk.start_param_sync(force_sync=True)
        else:
            super()._spread_weights(owned)

    def _gather_weights(self) -> None:
        """Finish what `overlap_param_gather` leaves to the next forward pass."""
        if self._gathers_late:
            for model_chunk in self.model_chunks:
                model_chunk.start_param_sync(force_sync=True)

    def _clear_gradients(self) -> None:
        for model_chunk in self.model_chunks:
            model_chunk.zero_grad_buffer()
        self.optimizer.clear_gradients()


def _finalize_gradients(models: list, num_tokens: Tensor | None = None, **options: Any) -> None:
    """Reduce the gradients, without dividing them by the number of tokens.

    Megatron asks on the host whether that number is above 0, which waits for the device; the engine
    divides by the number that it sums with the loss.
    """
    finalize_model_grads(models, None, **options)
