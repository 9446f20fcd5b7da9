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

DeepSpeed's optimizers decide on the host whether a step is applied, so nothing can tell them on the
device to change nothing: the engine reads the verdict before the update. The gradient norm of the
verdict is DeepSpeed's own, computed before its step instead of inside it. DeepSpeed reads the norm
a few times more by itself.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.checkpoint import TensorSlice
from pretrain.config import RunConfig, support
from pretrain.data import Batch
from pretrain.engines import deepspeed_compat as compat
from pretrain.engines.base import Held
from pretrain.engines.microbatches import forward, run_microbatches
from pretrain.engines.model import ModelEngine
from pretrain.engines.state import (
    OPTIMIZER_STATE,
    is_owner,
    optimizer_prefix,
    partition_slices,
    weight_slices,
)
from pretrain.engines.verdict import Verdict
from pretrain.layout import Layout
from xlstm_mcore.layer import XLSTMLayer
from xlstm_mcore.parameters.slices import is_shared, slices_of


class DeepSpeedEngine(ModelEngine):
    """See `pretrain.engines.base.Engine`.

    Args:
        config: the run.
        layout: the process layout the run was started on.

    Raises:
        ConfigError: DeepSpeed is missing or of another release line.
    """

    def __init__(self, config: RunConfig, layout: Layout, *, initial_values: bool = True) -> None:
        deepspeed = compat.load(layout.device)
        self.stage = support.zero_stage(config)
        # With the optimizer offloaded, bf16 gradients leave for the host after each backward pass.
        offloaded = config.engine.offload != "none" and config.engine.precision == "bf16"
        self._reduces_each_micro_batch = self.stage > 1 or offloaded
        self._unit = compat.ModelParallelUnit(layout)
        self._partitioner = compat.Partitioner(self._unit)
        super().__init__(config, layout, initial_values=initial_values)
        self._prepare_parameters()
        self._lend_weights()
        one = len(self.models) == 1
        self.engine, *_ = deepspeed.initialize(
            model=self.models[0] if one else nn.ModuleList(self.models),
            optimizer=self._make_optimizer(),
            mpu=self._unit,
            config=self._settings(),
            dist_init_required=False,
        )
        compat.create_adam_state(self.engine.optimizer)

    def forward_backward(self, batches: list[Batch]) -> Tensor:
        """Loss of one global batch; gradients wait in DeepSpeed's buffers for `step`."""
        self.engine.train()
        tokens = torch.stack([batch.loss_mask.sum() for batch in batches]).sum().double()
        tokens = tokens.to(self.layout.device, non_blocking=True)
        groups = self.layout.groups
        torch.distributed.all_reduce(tokens, group=groups.dp)  # whole rows, so once per replica
        scale = (groups.dp_cp.size() / tokens.clamp(min=1.0)).float()
        with self._gradient_window():
            return self._run(batches, forward_only=False, loss_scale=scale)

    def gradient_norm(self) -> Tensor:
        """The 2-norm of the whole gradient, a scalar; infinite where a gradient is not finite."""
        norm = compat.gradient_norm(self.engine.optimizer)
        self._norm_device = norm.device  # that of an offloaded optimizer is in host memory
        return norm.to(self.layout.device, non_blocking=True)

    def gradients(self) -> Iterator[TensorSlice]:
        """The slices of the whole gradient that this rank counts; gathered one by one."""
        first_replica = self.layout.groups.dp_cp.rank() == 0
        for _, parameter, slices in self._parameters():
            gradient = compat.whole_gradient(parameter)
            if first_replica and is_owner(parameter, self.layout):
                for part in slices:
                    values = part.local(gradient)
                    yield TensorSlice(part.name, part.global_shape, part.global_offset, values)

    def step(self, lr: float, verdict: Verdict) -> None:
        """Clip and update with learning rate `lr` if the verdict allows it; clear the gradients.

        Reads the verdict before the update.
        """
        accepted = verdict.read().accepted
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        norm = verdict.grad_norm if accepted else torch.full_like(verdict.grad_norm, torch.inf)
        with compat.known_norm(self.engine.optimizer, norm.to(self._norm_device)):
            self.engine.step()
        assert self.engine.was_step_applied() == accepted

    def load_sharded_state(self, load: Callable[[list[TensorSlice]], Any], updates: int) -> None:
        """Fill weights, fp32 masters and moments, each rank only its own part.

        Below stage 3 every replica has all weights; see `ModelEngine._load_shared`.

        Args:
            load: copies a checkpoint's values into the slices it is given.
            updates: optimizer updates done so far, for Adam's bias correction.
        """
        optimizer = self.engine.optimizer
        state = [part for _, part in self._optimizer_slices()]
        with torch.no_grad():
            if self.stage < 3:
                self._load_shared(load, state)
            else:
                with compat.writable_partitions(optimizer):
                    load([*(part for _, part in self._weights()), *state])
        compat.set_adam_step(optimizer, updates)

    def held_gradients(self) -> Iterator[Held]:
        """The gradients of what tensor-parallel ranks replicate, gathered from the partitions."""
        # Those of an offloaded optimizer are in host memory, each rank's own part alone.
        if self.layout.groups.tp.size() == 1 or self.config.engine.offload != "none":
            return
        for _, parameter, slices in self._parameters():
            if not parameter.tensor_model_parallel:
                gradient = compat.whole_gradient(parameter)
                name = f"gradient of {slices[0].name}"
                yield Held(name, gradient, over_data=False, over_tensor=True)

    def close(self) -> None:
        """Free the memory of model and optimizer."""
        compat.destroy(self.engine)

    def _share_of_weights(self) -> list[tuple[Tensor, TensorSlice]]:
        """Stage 3 has shared out the weights itself."""
        return list(self._weights()) if self.stage == 3 else super()._share_of_weights()

    def _held_weights(self) -> Iterator[Held]:
        """Stage 3 has none that another rank has too."""
        return iter(()) if self.stage == 3 else super()._held_weights()

    def _callables(self) -> list[nn.Module]:
        """Stages 2 and 3 have their weights through DeepSpeed's engine alone."""
        return [self.engine] if self.stage > 1 else self.model_chunks

    def _finish_part(self, part: nn.Module) -> None:
        """Stage 3 keeps its partition of a part before the next one is built."""
        if self.stage == 3:
            self._partitioner(part, self._settings(), self.model_config.params_dtype)

    def _prepare_parameters(self) -> None:
        """Tell DeepSpeed what Megatron's own engine knows about parameters.

        - The gradient norm counts a parameter on every tensor-parallel rank if it has
          `tensor_model_parallel`, else once: a split one without it would be lost from the norm.
        - With sequence parallelism a replicated weight has seen a part of the sequence on each
          rank. Where DeepSpeed takes its gradient after every micro-batch, it is summed before
          that; otherwise once, see `_complete_gradients`.
        - The last stage's copy of a tied embedding counts once in the norm.
        """
        group = self.layout.groups.tp
        for name, parameter, slices in self._parameters():
            is_split = slices[0].shape != slices[0].global_shape
            assert parameter.tensor_model_parallel == is_split, name
            parameter.ds_pipe_replicated = is_shared(parameter)
            if parameter.sequence_parallel and self._reduces_each_micro_batch:
                parameter.register_hook(lambda grad: _sum_over(grad.float(), group).to(grad))

    def _lend_weights(self) -> None:
        """Stage 3 gathers a module's own weights, so it is told which others a module needs."""
        if self.stage < 3:
            return
        for model in self.models:
            for layer in model.modules():
                if isinstance(layer, XLSTMLayer):
                    for module, weight in layer.borrowed_weights():
                        compat.gather_with(module, weight)

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
            "communication_data_type": config.engine.grad_reduce,
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
        """Stage 1: sum in fp32 what ranks hold in parts that are not data-parallel replicas.

        Does nothing where DeepSpeed has taken the gradients already: see `_prepare_parameters`. A
        tied embedding's parts lie on the first and the last pipeline stage; with sequence
        parallelism those of a replicated weight on the tensor-parallel ranks.
        """
        if self._reduces_each_micro_batch:
            return
        groups = self.layout.groups
        for model in self.models:
            for parameter in model.parameters():
                gradient = compat.summed_gradient(parameter)
                if groups.pp.size() > 1 and getattr(parameter, "shared_embedding", False):
                    _sum_over(gradient, groups.embd)
                if parameter.sequence_parallel:
                    _sum_over(gradient, groups.tp)

    def _run(
        self, batches: list[Batch], *, forward_only: bool, loss_scale: float | Tensor = 1.0
    ) -> Tensor:
        """Run micro-batches; stages 2 and 3 call DeepSpeed for each of them."""
        with self._products():
            if self.stage == 1:
                losses = run_microbatches(
                    self.model_chunks,
                    batches,
                    self.layout,
                    self.config.data,
                    forward_only=forward_only,
                    loss_scale=loss_scale,
                )
            else:
                losses = self._run_one_by_one(batches, forward_only, loss_scale)
        return self._sum(losses, batches)

    def _run_one_by_one(
        self, batches: list[Batch], forward_only: bool, loss_scale: float | Tensor
    ) -> list[Tensor]:
        losses = []
        for number, batch in enumerate(batches, 1):
            self.engine.set_gradient_accumulation_boundary(number == len(batches))
            output, loss_function = forward(self.engine, batch, self.layout, loss_scale)
            loss, _, reported = loss_function(output)
            losses.append(reported["sums"])
            if not forward_only:
                self.engine.backward(loss, scale_wrt_gas=False)
        return losses

    def _weights(self) -> Iterator[tuple[Tensor, TensorSlice]]:
        """Each parameter with the slices of the weights in compute precision that this rank has."""
        for _, parameter, slices in self._parameters():
            if self.stage == 3:
                found: Any = partition_slices(
                    slices,
                    parameter.ds_shape,
                    compat.partition(parameter),
                    *compat.partition_range(parameter),
                )
            else:
                found = weight_slices(parameter, slices)
            yield from ((parameter, part) for part in found)

    def _optimizer_slices(self) -> Iterator[tuple[Tensor, TensorSlice]]:
        """Each parameter with the slices of master weight and moments in this rank's partition."""
        for model in self.models:
            for held in compat.partitions(self.engine.optimizer, model):
                parameter = held.parameter
                shape = parameter.ds_shape if self.stage == 3 else parameter.shape
                for key in OPTIMIZER_STATE:
                    for part in partition_slices(
                        slices_of(parameter),
                        shape,
                        held.state[key],
                        held.start,
                        held.end,
                        optimizer_prefix(key),
                    ):
                        yield parameter, part


def _sum_over(tensor: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    torch.distributed.all_reduce(tensor, group=group)
    return tensor
