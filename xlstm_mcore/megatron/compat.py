"""The private parts of megatron-core that this project touches, for every supported version.

They are tested with 0.16.1 and 0.19.2 (constraints/). No other module reaches into an optimizer's
internals.
"""

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from xlstm_mcore.modules.products import add_product

# TransformerConfig's default for this field prints a deprecation warning of its own.
QUIET = {"cuda_graph_scope": []}


def seed_parallel(seed: int) -> None:
    """Seed the default random state and those that differ over tensor-parallel ranks."""
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def parallel_rng() -> Any:
    """Context in which random numbers differ over tensor-parallel ranks."""
    return tensor_parallel.get_cuda_rng_tracker().fork()


def release_hooks(chunk: Any) -> None:
    """Release the hooks that a `DistributedDataParallel` has on gradients.

    They refer to it, and it refers to them, through C++, where the garbage collector does not look.
    Without this the model and its buffers would stay for as long as the process lives.
    """
    chunk.grad_accs.clear()


@functools.cache
def fuse_weight_gradients() -> None:
    """Let megatron-core's linear layers add their weights' gradients to the fp32 buffers.

    They do so where Apex gives them a function for it, and torch has that product now. Without it a
    gradient is rounded to bf16, written, read and added. It must come before layers are built; they
    do it where their `config.gradient_accumulation_fusion` says so and DDP has given buffers.
    """
    layers: Any = importlib.import_module("megatron.core.tensor_parallel.layers")
    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = _WeightGradients
        layers._grad_accum_fusion_available = True
    layers.LinearWithGradAccumulationAndAsyncCommunication = _with_its_weight(
        layers.LinearWithGradAccumulationAndAsyncCommunication
    )


class _WeightGradients:
    """Stands where megatron-core looks for Apex's module."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, d_outputs: Tensor, main_grad: Tensor) -> None:
        """`main_grad += d_outputs.T @ inputs`."""
        add_product(main_grad, d_outputs.t(), inputs)

    # What megatron-core asks for where the buffers are bf16: `engine.grad_reduce`.
    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def _with_its_weight(linear: Any) -> type:
    """The autograd function of megatron-core's linear layers, whose backward has the parameter.

    It marks the parameter whose gradient it has added. What autograd saved is another Python object
    where hooks for saved tensors are in force, as they are under selective recompute. The parameter
    would stay without a mark and a gradient, which DDP refuses when it overlaps the reduction.
    """

    class LinearWithItsWeight(linear):
        @staticmethod
        def forward(ctx, x, weight, *options):
            ctx.weight = weight
            return linear.forward(ctx, x, weight, *options)

        @staticmethod
        def backward(ctx, d_output):
            return linear.backward(_Saved(ctx), d_output)

    return LinearWithItsWeight


class _Saved:
    """A context of `LinearWithItsWeight`, with the parameter among the tensors that were saved."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    @property
    def saved_tensors(self) -> tuple[Tensor, Tensor]:
        return self._ctx.saved_tensors[0], self._ctx.weight


def partition_ranges(optimizer: Any) -> Iterator[tuple[Tensor, int, int]]:
    """Flat ranges of the parameters that a DistributedOptimizer updates on this rank.

    Yields:
        `(parameter, start, end)`: the optimizer owns elements `[start, end)` of the flattened
        local parameter.
    """
    for buffers in optimizer.gbuf_ranges:
        for buckets in buffers.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    inside = ranges["param"]
                    yield parameter, inside.start, inside.end


def gradients_for_norm(optimizer: Any) -> list[Tensor]:
    """The gradients of an optimizer that this rank counts in the norm of the whole gradient.

    Left out are copies of tied weights, and all but one rank's of what tensor-parallel ranks share.
    """
    # 0.19 renamed it.
    name = "get_grads_for_grad_norm"
    if not hasattr(optimizer, name):
        name = "get_main_grads_for_grad_norm"
    return getattr(optimizer, name)()


def adam_state(optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
    """Flat fp32 `param` (master weight), `exp_avg` and `exp_avg_sq` of a parameter's partition."""
    group, index = optimizer.model_param_group_index_map[parameter]
    main = optimizer.optimizer.param_groups[group]["params"][index]
    state = optimizer.optimizer.state[main]
    return {"param": main, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}


def create_adam_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocate Adam's state now instead of at the first step, so that it can be loaded into.

    megatron-core's own way leaves out `step` for torch's Adam (KeyError at the first update) and
    asserts on a fresh optimizer's state.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
    set_adam_step(optimizer, 0)


def set_adam_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the number of updates done, which Adam's bias correction depends on.

    torch's Adam counts in one tensor per parameter. megatron-core's loader gives all parameters the
    *same* tensor, which then counts once per parameter: the first step after a resume is right and
    every later one silently wrong. Fused optimizers (TransformerEngine, Apex) count in the group.
    """
    for group in optimizer.param_groups:
        if not isinstance(optimizer, torch.optim.Adam):
            group["step"] = step
            continue
        for parameter in group["params"]:
            # The fused form counts where the parameter is, every other one on the host.
            device = parameter.device if group.get("fused") else "cpu"
            optimizer.state[parameter]["step"] = torch.tensor(float(step), device=device)
