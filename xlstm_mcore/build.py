"""From a configuration to model chunks, on any layout or in one process."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.megatron import compat, cpu_runtime
from xlstm_mcore.model import XLSTMModel
from xlstm_mcore.parameters.init import initialize

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_config(
    model: dict[str, Any],
    *,
    precision: str = "fp32",
    tensor: int = 1,
    sequence: bool = False,
    pipeline: int = 1,
    virtual: int = 1,
    context: int = 1,
    backend: str = "gloo",
    deterministic: bool = False,
    recompute: str = "none",
    recompute_full_blocks: str = "",
    logits_mib: int = 512,
) -> XLSTMConfig:
    """XLSTMConfig from the ``model:`` section of a run and its layout.

    Args:
        model: the section's keys and values.
        precision: "fp32" or "bf16", of parameters and activations.
        tensor: tensor-parallel size.
        sequence: sequence parallelism (needs ``tensor > 1`` to have an effect).
        pipeline: pipeline-parallel size.
        virtual: model chunks per pipeline rank.
        context: context-parallel size.
        backend: communication backend, for settings that gloo needs.
        deterministic: megatron-core takes operations that give the same bits every time.
        recompute: "none", "selective" or "full" (recompute.py).
        recompute_full_blocks: letters whose blocks are recomputed in full anyway.
        logits_mib: logits of a micro-batch that take more MiB on a rank are never whole (loss.py).
    """
    dtype = PRECISION[precision]
    return XLSTMConfig(
        **model,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        tensor_model_parallel_size=tensor,
        sequence_parallel=sequence and tensor > 1,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=context,
        recompute=recompute,
        recompute_full_blocks=recompute_full_blocks,
        logits_mib=logits_mib,
        # Parameters are initialised by name (init.py), never by the layers themselves.
        perform_initialization=False,
        # The loss is the mean over the global batch's unmasked tokens, however it is split.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        deterministic_mode=deterministic,
        **compat.QUIET,
        **cpu_runtime.pipeline_settings(backend),
    )


def build_model(
    config: XLSTMConfig,
    pg_collection: ProcessGroupCollection,
    seed: int,
    finish: Callable[[nn.Module], None] = lambda part: None,
) -> list[XLSTMModel]:
    """This rank's model chunks (one, or ``virtual`` with interleaved stages), initialised.

    Args:
        config: the model's configuration and layout.
        pg_collection: process groups.
        seed: of the initial values.
        finish: called with every part (embedding, layer, final norm, head) once it has its initial
            values and before the next one is made; it may take their memory away.
    """
    cpu_runtime.activate()

    def built(part: nn.Module) -> None:
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
