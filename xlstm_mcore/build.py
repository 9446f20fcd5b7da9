"""From a configuration to model chunks, on any layout or in one process."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.megatron import compat, cpu_runtime
from xlstm_mcore.model import XLSTMModel
from xlstm_mcore.parameters.init import initialize, leave_open
from xlstm_mcore.settings import LayoutConfig, MemoryConfig, ModelConfig

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_config(
    model: ModelConfig | Mapping[str, Any],
    *,
    layout: LayoutConfig | Mapping[str, Any] | None = None,
    memory: MemoryConfig | Mapping[str, Any] | None = None,
    precision: str = "fp32",
    backend: str = "gloo",
    deterministic: bool = False,
    fuses_weight_gradients: bool = False,
) -> XLSTMConfig:
    """Megatron's configuration from the sections of a run; a section may come as a mapping.

    Args:
        model: the architecture.
        layout: sizes of the parallel dimensions; one process without it.
        memory: what the backward pass computes again; the section's defaults without it.
        precision: "fp32" or "bf16", of parameters and activations.
        backend: communication backend, for settings that gloo needs.
        deterministic: megatron-core takes operations that give the same bits every time.
        fuses_weight_gradients: linear layers add to the buffers of Megatron's DDP, which must be
            there; see `compat.fuse_weight_gradients`.

    Raises:
        ValueError: a section has an unknown key or a value out of its range.
    """
    dtype = PRECISION[precision]
    if fuses_weight_gradients:
        compat.fuse_weight_gradients()
    sizes = LayoutConfig.model_validate(layout or {})
    return XLSTMConfig(
        model=ModelConfig.model_validate(model),
        memory=MemoryConfig.model_validate(memory or {}),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        tensor_model_parallel_size=sizes.tensor,
        sequence_parallel=sizes.sequence and sizes.tensor > 1,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual if sizes.virtual > 1 else None,
        context_parallel_size=sizes.context,
        # Parameters are initialised by name (init.py), never by the layers themselves.
        perform_initialization=False,
        # The loss is the mean over the global batch's unmasked tokens, however it is split.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=fuses_weight_gradients,
        deterministic_mode=deterministic,
        **compat.QUIET,
        **cpu_runtime.pipeline_settings(backend, sizes.virtual),
    )


def build_model(
    config: XLSTMConfig,
    pg_collection: ProcessGroupCollection,
    seed: int | None,
    finish: Callable[[nn.Module], None] = lambda part: None,
) -> list[XLSTMModel]:
    """This rank's model chunks (one, or `virtual` of them with interleaved stages), initialised.

    Args:
        config: the model's configuration and layout.
        pg_collection: process groups.
        seed: decides the initial values. With None all weights are NaN until a checkpoint is read.
        finish: called with every part (embedding, layer, final norm, head) once it has its initial
            values and before the next one is made; it may take their memory away.
    """
    cpu_runtime.activate()

    def built(part: nn.Module) -> None:
        if seed is None:
            leave_open(part)
        else:
            initialize(part, config, seed)
        finish(part)

    pp_size, pp_rank = pg_collection.pp.size(), pg_collection.pp.rank()
    chunks = config.virtual_pipeline_model_parallel_size or 1
    last = pp_size * chunks - 1
    models = []
    for vp_stage in range(chunks):
        stage = vp_stage * pp_size + pp_rank
        model = XLSTMModel(
            config,
            pg_collection,
            pre_process=stage == 0,
            post_process=stage == last,
            stage=stage,
            vp_stage=vp_stage if chunks > 1 else None,
            built=built,
        )
        models.append(model)
    return models
