"""The DeepSpeed engine: ZeRO 1, 2, 3 and offload under the model's tensor and pipeline parallelism.

Two ways to sum gradients over micro-batches, both in fp32:

- stage 1: Megatron's schedules run the plain modules; gradients stay whole on every rank until the
  last micro-batch and are reduced once. The same code serves pipeline stages.
- stages 2 and 3: each micro-batch is reduced into the rank's own partition right after its backward
  pass, which is what saves the memory; Megatron's schedules know nothing of it, so DeepSpeed's
  engine is called for each micro-batch, and there are no pipeline stages.

DeepSpeed averages gradients over data-parallel ranks; the loss here is the sum over unmasked tokens
of the global batch divided by their number. That number is known before the first backward pass, so
the loss is scaled by (ranks / tokens) and the average comes out as the wanted sum.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.checkpoint import TensorSlice
from pretrain.config import RunConfig, support
from pretrain.data import Batch
from pretrain.engines import deepspeed_compat as compat
from pretrain.engines.base import LossSum, StepResult
from pretrain.engines.microbatches import ScheduledEngine
from pretrain.engines.state import OPTIMIZER_STATE, optimizer_prefix, range_slices, weight_slices
from pretrain.layout import Layout
from xlstm_mcore.parameters.slices import named_slices


class DeepSpeedEngine(ScheduledEngine):
    """See :class:`pretrain.engines.base.Engine`.

    Args:
        config: the run.
        layout: the process layout the run was started on.

    Raises:
        ConfigError: DeepSpeed is missing or of another release line.
    """

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        deepspeed = compat.load(layout.device)
        self.stage = support.zero_stage(config)
        self._unit = compat.ModelParallelUnit(layout)
        self._partitioner = compat.Partitioner(self._unit)
        super().__init__(config, layout)
        self._prepare_parameters()
        one = len(self.models) == 1
        self.engine, *_ = deepspeed.initialize(
            model=self.models[0] if one else nn.ModuleList(self.models),
            optimizer=self._make_optimizer(),
            mpu=self._unit,
            config=self._settings(),
            dist_init_required=False,
        )
        compat.create_adam_state(self.engine.optimizer)

    def forward_backward(self, batches: list[Batch]) -> LossSum:
        """Loss of one global batch; gradients wait in DeepSpeed's buffers for :meth:`step`."""
        self.engine.train()
        tokens = torch.stack([batch.loss_mask.sum() for batch in batches]).sum().double()
        tokens = tokens.to(self.layout.device)
        groups = self.layout.groups
        torch.distributed.all_reduce(tokens, group=groups.dp)  # whole rows, so once per replica
        scale = groups.dp_cp.size() / max(1.0, tokens.item())
        with self._gradient_window():
            return self._run(batches, forward_only=False, loss_scale=scale)

    def step(self, lr: float) -> StepResult:
        """Clip, update with learning rate ``lr`` and clear the gradients."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        applied = self.engine.was_step_applied()
        norm = float(self.engine.get_global_grad_norm())
        assert applied == math.isfinite(norm)
        return StepResult(grad_norm=norm, skipped=not applied)

    def sharded_state(self) -> list[TensorSlice]:
        """The rectangles this rank saves: every element of the state lies on exactly one rank."""
        chunks = []
        if self.stage == 3 or self.layout.groups.dp_cp.rank() == 0:
            chunks += [c for parameter, c in self._weight_slices() if self._is_owner(parameter)]
        return chunks + [c for p, c in self._optimizer_slices() if self._is_owner(p)]

    def load_sharded_state(self, load: Callable[[list[TensorSlice]], Any], step: int) -> None:
        """Fill weights, fp32 masters and moments, each rank only its own part.

        Args:
            load: copies a checkpoint's values into the chunks it is given.
            step: optimizer steps taken so far, for Adam's bias correction.
        """
        optimizer = self.engine.optimizer
        split = compat.writable_partitions(optimizer) if self.stage == 3 else None
        with split or contextlib.nullcontext(), torch.no_grad():
            load(
                [chunk for _, chunk in self._weight_slices()]
                + [chunk for _, chunk in self._optimizer_slices()]
            )
        compat.set_adam_step(optimizer, step)

    def close(self) -> None:
        """Free the memory of model and optimizer."""
        compat.destroy(self.engine)

    def _finish_part(self, part: nn.Module) -> None:
        """Stage 3 keeps its share of a part before the next one is built."""
        if self.stage == 3:
            self._partitioner(part, self._settings(), self.model_config.params_dtype)

    def _prepare_parameters(self) -> None:
        """Tell DeepSpeed what Megatron's own engine knows about parameters.

        - The gradient norm counts a parameter on every tensor-parallel rank if it has
          ``tensor_model_parallel``, else once: a shard without it would be lost from the norm.
        - With sequence parallelism a replicated weight has seen a part of the sequence on each
          rank. Stages 2 and 3 split its gradient after every micro-batch, so it is summed before
          DeepSpeed takes it; stage 1 sums it once, see :meth:`_complete_gradients`.
        - The last stage's copy of a tied embedding counts once in the norm.
        """
        group = self.layout.groups.tp
        for model in self.models:
            for name, parameter, slices in named_slices(model):
                sharded = slices[0].shape != slices[0].global_shape
                assert parameter.tensor_model_parallel == sharded, name
                parameter.ds_pipe_replicated = getattr(parameter, "shared", False)
                if parameter.sequence_parallel and self.stage > 1:
                    parameter.register_hook(lambda grad: _sum_over(grad.float(), group).to(grad))

    def _make_optimizer(self) -> torch.optim.Optimizer:
        options = self.config.optimizer
        parameters = [p for model in self.models for p in model.parameters()]
        groups = [
            {
                "params": [p for p in parameters if p.no_weight_decay == without],
                "weight_decay": 0.0 if without else options.weight_decay,
            }
            for without in (False, True)
        ]
        # torch's: DeepSpeed's own Adams are compiled with a C++ compiler at start-up.
        return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps)

    def _settings(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        config = self.config
        zero: dict[str, Any] = {
            "stage": self.stage,
            "overlap_comm": support.overlaps(config, self.layout.backend)[0],
            # Stage 3 would replace torch's own linear function for the rest of the process;
            # Megatron's linear layers keep the parameter itself for the backward pass already.
            "memory_efficient_linear": False,
        }
        if config.engine.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu"}
        if config.engine.offload == "parameters":
            zero["offload_param"] = {"device": "cpu"}
        settings: dict[str, Any] = {
            # One "step" of DeepSpeed is one of ours; micro-batches are counted here.
            "train_micro_batch_size_per_gpu": config.data.micro_batch,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.optimizer.clip_grad,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "steps_per_print": None,
        }
        if config.engine.precision == "bf16":
            settings["bf16"] = {
                "enabled": True,
                "check_grad_overflow": True,
                # Stage 1: every micro-batch's gradient goes into the fp32 sum at once.
                "immediate_grad_update": self.stage == 1,
            }
        return settings

    @contextlib.contextmanager
    def _gradient_window(self) -> Iterator[None]:
        """Around all micro-batches of a step: one reduction when it ends (stage 1)."""
        if self.stage > 1:
            yield  # reduced by every backward pass
        elif self.config.engine.precision == "bf16":
            self.engine.set_gradient_accumulation_boundary(True)
            yield
            self._complete_gradients()
            self.engine.allreduce_gradients()
        else:
            with self.engine.coalesce_grad_reduction():
                yield
                self._complete_gradients()

    def _complete_gradients(self) -> None:
        """Stage 1: sum in fp32 what ranks hold in parts that are no data-parallel replicas.

        A tied embedding's parts lie on the first and the last pipeline stage; with sequence
        parallelism those of a replicated weight on the tensor-parallel ranks.
        """
        groups = self.layout.groups
        for model in self.models:
            for parameter in model.parameters():
                gradient = compat.summed_gradient(parameter)
                if groups.pp.size() > 1 and getattr(parameter, "shared_embedding", False):
                    _sum_over(gradient, groups.embd)
                if parameter.sequence_parallel:
                    _sum_over(gradient, groups.tp)

    def _run(self, batches: list[Batch], forward_only: bool, loss_scale: float = 1.0) -> LossSum:
        """See :class:`ScheduledEngine`; stages 2 and 3 call DeepSpeed for each micro-batch."""
        if self.stage == 1:
            return super()._run(batches, forward_only, loss_scale)
        sums = []
        for number, batch in enumerate(batches, 1):
            self.engine.set_gradient_accumulation_boundary(number == len(batches))
            output, loss_function = self._forward_step(iter([batch]), self.engine, loss_scale)
            loss, _, reported = loss_function(output)
            sums.append(reported["sums"])
            if not forward_only:
                self.engine.backward(loss, scale_wrt_gas=False)
        return self._sum_losses(sums)

    def _weight_slices(self) -> Iterator[tuple[Tensor, TensorSlice]]:
        """Rectangles of the weights in compute precision that this rank holds."""
        for model in self.models:
            for _, parameter, slices in named_slices(model):
                if self.stage == 3:
                    chunks: Any = range_slices(
                        slices,
                        parameter.ds_shape,
                        compat.partition(parameter),
                        *compat.partition_range(parameter),
                    )
                else:
                    chunks = weight_slices(parameter, slices)
                yield from ((parameter, chunk) for chunk in chunks)

    def _optimizer_slices(self) -> Iterator[tuple[Tensor, TensorSlice]]:
        """Rectangles of fp32 masters and moments that this rank's partition holds."""
        for model in self.models:
            for shard in compat.shards(self.engine.optimizer, model):
                parameter = shard.parameter
                shape = parameter.ds_shape if self.stage == 3 else parameter.shape
                for key in OPTIMIZER_STATE:
                    for chunk in range_slices(
                        parameter.slices,
                        shape,
                        shard.state[key],
                        shard.start,
                        shard.end,
                        optimizer_prefix(key),
                    ):
                        yield parameter, chunk


def _sum_over(tensor: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    torch.distributed.all_reduce(tensor, group=group)
    return tensor
