"""AdamW whose state is shared out over the data-parallel ranks: Megatron's DistributedOptimizer."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from torch import Tensor

from pretrain.checkpoint import TensorSlice
from pretrain.config import RunConfig
from pretrain.engines.gradients import clip_gradients, sum_of_squares
from pretrain.engines.state import OPTIMIZER_STATE, optimizer_prefix, partition_slices
from pretrain.engines.verdict import Verdict
from pretrain.layout import Layout
from xlstm_mcore.megatron import compat, cpu_runtime
from xlstm_mcore.parameters.slices import slices_of


class AdamWDistributed:
    """See `pretrain.engines.base.Optimizer`.

    Megatron's own `step` reads the gradient norm on the host and lets a norm of NaN through into
    the weights (it only compares the clipping factor with 1). So norm and clipping are done here,
    on the device, and Megatron is asked for the update alone.

    Args:
        config: the run.
        layout: the process layout the run was started on.
        model_chunks: this rank's model chunks; their gradients lie in Megatron's buffers.
    """

    shares_gradients = True

    def __init__(
        self, config: RunConfig, layout: Layout, model_chunks: list[DistributedDataParallel]
    ) -> None:
        self._options, self._layout = config.optimizer, layout
        options = config.optimizer
        cpu_runtime.activate()
        self.megatron: Any = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=options.lr,
                weight_decay=options.weight_decay,
                adam_beta1=options.betas[0],
                adam_beta2=options.betas[1],
                adam_eps=options.eps,
                clip_grad=options.clip_grad,
                bf16=config.engine.precision == "bf16",
                params_dtype=model_chunks[0].config.params_dtype,
                use_distributed_optimizer=True,
            ),
            model_chunks,
            config_overrides={ParamKey(attr="no_weight_decay"): {"wd_mult": 0.0}},
            use_gloo_process_groups=False,
            pg_collection=layout.groups,
        )
        adams = [part.optimizer for part in self.megatron.chained_optimizers]
        self._flags_of = adams if all(mask_on_device(adam, layout.device) for adam in adams) else []
        for adam in adams:
            compat.create_adam_state(adam)

    def gradient_norm(self) -> Tensor:
        """Take the gradients from the buffers; their 2-norm over all ranks, fp64."""
        self.megatron.prepare_grads()
        gradients = [
            gradient
            for part in self.megatron.chained_optimizers
            for gradient in compat.gradients_for_norm(part)
        ]
        # A stage may hold nothing but its copy of a tied embedding: then there are none.
        total = sum_of_squares(gradients, self._layout.device)
        torch.distributed.all_reduce(total, group=self.megatron.get_grad_stats_parallel_group())
        return total.sqrt()

    def step(self, lr: float, verdict: Verdict) -> None:
        """Clip and update with learning rate `lr` if the verdict allows it."""
        for adam in self._flags_of:
            adam.found_inf = verdict.rejected
        if not self._flags_of and not verdict.read().accepted:
            return
        for group in self.megatron.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = self._options.weight_decay * group.get("wd_mult", 1.0)
        parameters = [p for o in self.megatron.chained_optimizers for p in o.get_parameters()]
        clip_gradients(parameters, self._options.clip_grad, verdict.grad_norm)
        self.megatron.step_with_ready_grads()

    def clear_gradients(self) -> None:
        """Forget the gradients that `gradient_norm` took."""
        self.megatron.zero_grad()

    def slices(self) -> Iterator[tuple[Tensor, TensorSlice]]:
        """Each parameter with the slices of master weight and moments in this rank's partition."""
        for part in self.megatron.chained_optimizers:
            for parameter, start, end in compat.partition_ranges(part):
                state = compat.adam_state(part, parameter)
                for key in OPTIMIZER_STATE:
                    for found in partition_slices(
                        slices_of(parameter),
                        parameter.shape,
                        state[key].detach(),
                        start,
                        end,
                        optimizer_prefix(key),
                    ):
                        yield parameter, found

    def gradients(self) -> Iterator[tuple[Tensor, TensorSlice]]:
        """Each parameter with the slices of its gradient in this rank's partition."""
        for part in self.megatron.chained_optimizers:
            for parameter, start, end in compat.partition_ranges(part):
                gradient = compat.adam_state(part, parameter)["param"].grad
                for found in partition_slices(
                    slices_of(parameter), parameter.shape, gradient, start, end
                ):
                    yield parameter, found

    def set_updates(self, updates: int) -> None:
        """Tell that the state was loaded, and how many updates were done before."""
        for part in self.megatron.chained_optimizers:
            compat.set_adam_step(part.optimizer, updates)


def mask_on_device(adam: torch.optim.Optimizer, device: torch.device) -> bool:
    """Make an Adam go over its state once, and skip its update where a tensor says so, if it can.

    torch's fused AdamW updates weights and moments in one pass. It reads its attribute `found_inf`
    on the device: where that is 1, weights, moments and step count stay as they are. On the CPU
    nothing is masked: reading a tensor means no wait there. TransformerEngine's Adam has neither.

    Args:
        adam: an optimizer without state.
        device: where its parameters are.

    Returns:
        Whether its update is masked.
    """
    if not isinstance(adam, torch.optim.AdamW):
        return False
    for group in adam.param_groups:
        group["fused"] = True
    return device.type != "cpu"
