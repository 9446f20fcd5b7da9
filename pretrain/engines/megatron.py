"""The Megatron engine: Megatron's schedules, DDP and DistributedOptimizer around XLSTMModel."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, clip_grads, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from torch import Tensor

from pretrain.checkpoint import TensorSlice
from pretrain.config import RunConfig, support
from pretrain.data import Batch
from pretrain.engines.base import LossSum, StepResult
from pretrain.engines.microbatches import ScheduledEngine
from pretrain.engines.state import OPTIMIZER_STATE, optimizer_prefix, range_slices, weight_slices
from pretrain.layout import Layout
from xlstm_mcore.megatron import compat, cpu_runtime
from xlstm_mcore.parameters.slices import named_slices


class MegatronEngine(ScheduledEngine):
    """See :class:`pretrain.engines.base.Engine`.

    Args:
        config: the run.
        layout: the process layout the run was started on.
    """

    # Whether data-parallel ranks share out the optimizer state.
    distributed_optimizer = True

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        super().__init__(config, layout)
        overlap_gradients, self._gathers_late = support.overlaps(config, layout.backend)
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=self.distributed_optimizer,
            overlap_grad_reduce=overlap_gradients,
            overlap_param_gather=self._gathers_late,
        )
        self.chunks = [
            DistributedDataParallel(
                self.model_config,
                ddp_config,
                model,
                disable_bucketing=number > 0,
                pg_collection=layout.groups,
            )
            for number, model in enumerate(self.models)
        ]
        self.optimizer = self._make_optimizer()
        self.model_config.finalize_model_grads_func = finalize_model_grads
        if overlap_gradients:  # only the last micro-batch's backward pass may reduce them
            no_sync: Any = [chunk.no_sync for chunk in self.chunks]
            self.model_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self._clear_gradients()

    def forward_backward(self, batches: list[Batch]) -> LossSum:
        """Loss of one global batch; gradients stay in the buffers until :meth:`step`."""
        for chunk in self.chunks:
            chunk.train()
        return self._run(batches, forward_only=False)

    def step(self, lr: float) -> StepResult:
        """Clip, update with learning rate ``lr`` and clear the gradients.

        Megatron's own ``step`` lets a gradient norm of NaN through into the weights (it only
        compares the clipping factor with 1), so the norm is judged here before anything changes.
        """
        options = self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = options.weight_decay * group.get("wd_mult", 1.0)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        finite = math.isfinite(norm)
        if finite:
            if options.clip_grad > 0:
                for optimizer in self.optimizer.chained_optimizers:
                    parameters = optimizer.get_parameters()
                    if parameters:
                        clip_grads.clip_grad_by_total_norm_fp32(parameters, options.clip_grad, norm)
            self.optimizer.step_with_ready_grads()
        self._clear_gradients()
        return StepResult(grad_norm=norm, skipped=not finite)

    def sharded_state(self) -> list[TensorSlice]:
        """The rectangles this rank saves: every element of the state lies on exactly one rank."""
        self._gather_weights()
        chunks = []
        if self.layout.groups.dp_cp.rank() == 0:
            for model in self.models:
                for _, parameter, slices in named_slices(model):
                    if self._is_owner(parameter):
                        chunks += weight_slices(parameter, slices)
        for parameter, chunk in self._optimizer_slices():
            if self._is_owner(parameter):
                chunks.append(chunk)
        return chunks

    def load_sharded_state(self, load: Callable[[list[TensorSlice]], None], step: int) -> None:
        """Fill weights, fp32 masters and moments.

        Args:
            load: copies a checkpoint's values into the chunks it is given.
            step: optimizer steps taken so far, for Adam's bias correction.
        """
        self._gather_weights()
        chunks = self._weights() + [chunk for _, chunk in self._optimizer_slices()]
        with torch.no_grad():
            load(chunks)
        for optimizer in self.optimizer.chained_optimizers:
            compat.set_adam_step(optimizer.optimizer, step)
        self._clear_gradients()

    def close(self) -> None:
        """Free the memory of model and optimizer."""
        # Weights in fp32 lead from the optimizer to DDP's hooks, and the configuration back to it.
        self.optimizer = self.model_config.grad_scale_func = None
        for chunk in self.chunks:
            compat.release_hooks(chunk)

    def _gather_weights(self) -> None:
        """Finish what ``overlap_param_gather`` leaves to the next forward pass."""
        if self._gathers_late:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def _weights(self) -> list[TensorSlice]:
        """The rectangles of all weights in this rank's model chunks."""
        return [
            chunk
            for model in self.models
            for _, parameter, slices in named_slices(model)
            for chunk in weight_slices(parameter, slices)
        ]

    def _make_optimizer(self) -> Any:
        options = self.config.optimizer
        cpu_runtime.activate()
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=options.lr,
                weight_decay=options.weight_decay,
                adam_beta1=options.betas[0],
                adam_beta2=options.betas[1],
                adam_eps=options.eps,
                clip_grad=options.clip_grad,
                bf16=self.config.engine.precision == "bf16",
                params_dtype=self.model_config.params_dtype,
                use_distributed_optimizer=True,
            ),
            self.chunks,
            config_overrides={ParamKey(attr="no_weight_decay"): {"wd_mult": 0.0}},
            use_gloo_process_groups=False,
            pg_collection=self.layout.groups,
        )
        for part in optimizer.chained_optimizers:
            compat.create_adam_state(part.optimizer)
        self.model_config.grad_scale_func = optimizer.scale_loss
        return optimizer

    def _clear_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def _optimizer_slices(self) -> Iterator[tuple[Tensor, TensorSlice]]:
        """Rectangles of fp32 masters and moments that this rank's optimizer shard holds."""
        for optimizer in self.optimizer.chained_optimizers:
            for parameter, start, end in compat.shard_ranges(optimizer):
                state = compat.adam_state(optimizer, parameter)
                for key in OPTIMIZER_STATE:
                    for chunk in range_slices(
                        parameter.slices,
                        parameter.shape,
                        state[key].detach(),
                        start,
                        end,
                        optimizer_prefix(key),
                    ):
                        yield parameter, chunk
