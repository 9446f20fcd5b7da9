"""DeepSpeed's private corners that this project touches, for the one supported release line.

Nothing else reaches into a DeepSpeed optimizer. What is read here was checked against 0.19.8; the
guard in `load` refuses other release lines, because a name that moved would not fail but
return the wrong tensor.

Three optimizers stand behind `engine.zero_stage` and `engine.precision`:

- stages 1 and 2: `DeepSpeedZeroOptimizer`, one flat fp32 partition per parameter group;
- stage 1 in bf16: `BF16_Optimizer` (chosen by DeepSpeed for fp32 gradient sums), the same shape;
- stage 3: `DeepSpeedZeroOptimizer_Stage3`, flat partitions of sub-groups, and every parameter's
  compute copy split as well.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.engines.gradients import sum_of_squares
from pretrain.layout import Layout
from xlstm_io.errors import ConfigError

RELEASES = "0.19"


def load(device: torch.device) -> ModuleType:
    """Import DeepSpeed, quiet and without building C++ at start-up.

    Args:
        device: where the run computes.

    Raises:
        ConfigError: DeepSpeed is not installed, or of a release line that was not tested.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # instead of a guess and a warning
    os.environ.setdefault("LOCAL_RANK", "0")  # read without asking; absent without a launcher
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"engine.name=deepspeed, but DeepSpeed cannot be imported ({error}); "
            f"pip install 'deepspeed>={RELEASES},<0.20', or use engine.name=megatron"
        ) from error
    if not deepspeed.__version__.startswith(f"{RELEASES}."):
        raise ConfigError(
            f"engine.name=deepspeed needs DeepSpeed {RELEASES}.x, and {deepspeed.__version__} is "
            f"installed; pip install 'deepspeed>={RELEASES},<0.20', or use engine.name=megatron"
        )
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None  # prints, whatever the log level
    # Its shared-memory all-reduce serves inference only, and building it takes minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class ModelParallelUnit:
    """Megatron's groups under the names that DeepSpeed asks for.

    It must not define any `*_sequence_parallel_*`: DeepSpeed would take those for Ulysses and
    rescale the gradients.
    """

    def __init__(self, layout: Layout) -> None:
        groups = layout.groups
        # (what DeepSpeed calls it, group): "model parallel" is one whole replica.
        for name, group in (
            ("model_parallel", groups.mp),
            ("tensor_model_parallel", groups.tp),
            ("pipeline_model_parallel", groups.pp),
            ("data_parallel", groups.dp_cp),
        ):
            setattr(self, f"get_{name}_group", lambda group=group: group)
            setattr(self, f"get_{name}_rank", lambda group=group: group.rank())
            setattr(self, f"get_{name}_world_size", lambda group=group: group.size())
        ranks = torch.distributed.get_process_group_ranks(groups.dp_cp)
        self.get_data_parallel_group_ranks = lambda: ranks


class Partitioner:
    """Stage 3: splits the parameters of a model part by part, while it is being built.

    DeepSpeed's `zero.Init` as a context would split a parameter when its module is made, before
    it has its initial value.

    Args:
        unit: the groups; parameters are split over their data-parallel one.
    """

    def __init__(self, unit: ModelParallelUnit) -> None:
        self._unit = unit
        self._init: Any = None

    def __call__(self, part: nn.Module, settings: dict[str, Any], dtype: torch.dtype) -> None:
        """Keep this rank's share of every parameter of `part`, on the device that stage 3 wants.

        Args:
            part: a module whose parameters are whole and the same on all data-parallel ranks.
            settings: DeepSpeed's configuration.
            dtype: of the parameters.
        """
        import deepspeed

        if self._init is not None:
            self._init._convert_to_zero_parameters(part.parameters())
            return
        deepspeed.init_distributed(dist_init_required=False)
        self._init = deepspeed.zero.Init(
            module=part,
            data_parallel_group=self._unit.get_data_parallel_group(),
            config_dict_or_path=settings,
            dtype=dtype,
            mpu=self._unit,
        )


def gather_with(module: nn.Module, weight: nn.Parameter) -> None:
    """Stage 3: gather `weight`, which another module owns, for both passes of `module` too.

    DeepSpeed takes it into the order of gathers that it records and reads ahead in, so this comes
    before the first forward pass.
    """
    from deepspeed.runtime.zero import register_external_parameter

    register_external_parameter(module, weight)


@dataclass(frozen=True)
class ParameterPartition:
    """What a rank's optimizer holds of one parameter.

    Attributes:
        parameter: the model's parameter.
        start: first element in the flattened local parameter.
        end: element after the last.
        state: flat fp32 views `param` (master weight), `exp_avg` and `exp_avg_sq`.
    """

    parameter: Tensor
    start: int
    end: int
    state: dict[str, Tensor]


def flat_partitions(optimizer: Any) -> list[Tensor]:
    """The flat fp32 master weights that this rank updates."""
    for name in (
        "fp32_partitioned_groups_flat",  # stage 3
        "fp32_groups_flat_partition",  # stage 1 in bf16
        "single_partition_of_fp32_groups",  # stages 1 and 2
    ):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise AssertionError(f"unknown DeepSpeed optimizer {type(optimizer).__name__}")


def restart_numbers() -> None:
    """Let the next engine of this process be numbered as the first one of a fresh process.

    Stage 3 numbers modules and parameters from counters that live as long as the process, and its
    ranks must agree on the numbers.
    """
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    (counter,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    counter[0] = Init.param_id = 0


def gradient_buffers(optimizer: Any) -> list[Tensor]:
    """The flat buffers of gradients that last for the whole run: those of stage 1 in bf16."""
    return list(getattr(optimizer, "fp32_groups_gradients_flat", ()))


def create_adam_state(optimizer: Any) -> None:
    """Allocate Adam's state now instead of at the first step, so that it can be loaded into.

    DeepSpeed 0.19.8 links parameters to this state inside the first group's first step, when the
    other groups have none yet; with the state in place there is nothing to link wrongly.
    """
    state = optimizer.optimizer.state
    for flat in flat_partitions(optimizer):
        state[flat].update(exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat))
    set_adam_step(optimizer, 0)


def set_adam_step(optimizer: Any, step: int) -> None:
    """Set the number of updates done: one tensor per flat partition, as torch's Adam counts."""
    for flat in flat_partitions(optimizer):
        optimizer.optimizer.state[flat]["step"] = torch.tensor(float(step))


def partitions(optimizer: Any, module: nn.Module) -> Iterator[ParameterPartition]:
    """What this rank's optimizer holds of every parameter of `module`."""
    for parameter in module.parameters():
        if hasattr(parameter, "ds_id"):  # stage 3
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start, end = partition_range(parameter)
            flat = optimizer.fp32_partitioned_groups_flat[group]
            assert end - start <= size
        else:
            mapping = parameter._hp_mapping
            if mapping is None:  # wholly in other ranks' partitions
                continue
            start = mapping.lp_fragment_address.start
            end = start + mapping.lp_fragment_address.numel
            flat = flat_partitions(optimizer)[mapping.param_group_index]
            offset = mapping.hp_fragment_address.start
        if start < end:
            state = optimizer.optimizer.state[flat]
            whole = {"param": flat.detach(), **{k: state[k] for k in ("exp_avg", "exp_avg_sq")}}
            views = {key: t.narrow(0, offset, end - start) for key, t in whole.items()}
            yield ParameterPartition(parameter, start, end, views)


def partition_range(parameter: Tensor) -> tuple[int, int]:
    """Range of the flattened parameter that this rank keeps at stage 3 (without padding)."""
    size = parameter.ds_tensor.ds_numel
    start = min(parameter.ds_numel, size * torch.distributed.get_rank(parameter.ds_process_group))
    return start, min(parameter.ds_numel, start + size)


def partition(parameter: Tensor) -> Tensor:
    """The compute copy that goes with `partition_range`: a flat view."""
    start, end = partition_range(parameter)
    return parameter.ds_tensor.data.narrow(0, 0, end - start)


@contextlib.contextmanager
def writable_partitions(optimizer: Any) -> Iterator[None]:
    """Stage 3: a block that writes `partition` views; small weights are kept whole again.

    Parameters below DeepSpeed's persistence threshold stay gathered between steps. They are
    released before the block and gathered after it, as DeepSpeed's own step does.
    """
    optimizer._partition_all_parameters()
    yield
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def summed_gradient(parameter: Tensor) -> Tensor:
    """The gradient summed over micro-batches, before the data-parallel reduction (stage 1)."""
    high_precision = getattr(parameter, "_hp_grad", None)
    return parameter.grad if high_precision is None else high_precision


def whole_gradient(parameter: Tensor) -> Tensor:
    """The complete gradient of a local parameter, fp32, gathered from the partitions.

    Called by all data-parallel ranks, after the last backward pass and before the step.
    """
    if hasattr(parameter, "ds_id"):  # stage 3
        return parameter._z3_optimizer.get_fp32_grad_for_param(parameter).view(parameter.ds_shape)
    return parameter.get_full_hp_grad()


def gradient_norm(optimizer: Any) -> Tensor:
    """2-norm of the whole gradient before clipping; infinite where any gradient is not finite.

    Called when the last backward pass is done, by all ranks.
    """
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.utils import combine_grad_norm_groups

    if isinstance(optimizer, bf16_optimizer.BF16_Optimizer):
        # DeepSpeed adds these up in fp32, and those of its other optimizers in fp64.
        gradients, _ = optimizer.get_grads_for_norm()
        total = sum_of_squares(gradients, gradients[0].device)
        torch.distributed.all_reduce(total, group=optimizer.mpu.get_model_parallel_group())
        norms = [total.sqrt()]
    elif hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
        optimizer._wait_for_offload_copies()
        norms = [optimizer.scaled_global_norm()]
    else:
        norms = optimizer._get_norm_groups()
    # DeepSpeed's name for a norm that is not finite is -1; this makes it infinite.
    return combine_grad_norm_groups(norms)


@contextlib.contextmanager
def known_norm(optimizer: Any, norm: Tensor) -> Iterator[None]:
    """A block in which the optimizer's step takes `norm` instead of computing the norm again.

    With an infinite norm the step changes nothing and discards the gradients in its own way.
    """
    from deepspeed.runtime import bf16_optimizer

    with contextlib.ExitStack() as undo:
        if isinstance(optimizer, bf16_optimizer.BF16_Optimizer):
            computed = bf16_optimizer.get_global_norm_of_tensors
            undo.callback(setattr, bf16_optimizer, "get_global_norm_of_tensors", computed)
            bf16_optimizer.get_global_norm_of_tensors = lambda *args, **kwargs: norm
        elif hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
            optimizer.scaled_global_norm = lambda: norm
            undo.callback(delattr, optimizer, "scaled_global_norm")
        else:
            optimizer._get_norm_groups = lambda: [norm]
            undo.callback(delattr, optimizer, "_get_norm_groups")
        yield


def destroy(engine: Any) -> None:
    """Let go of a DeepSpeed engine's memory.

    Its own `destroy` leaves methods on every parameter that are bound to that parameter, and
    stage 3's modules in a cache of the class; so the parameters are emptied.
    """
    parameters = list(engine.module.parameters())
    engine.destroy()
    for parameter in parameters:
        parameter.data = parameter.data.new_empty(0)
        vars(parameter).clear()
