"""From a configuration to model chunks, on any layout or in one process."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from . import cpu_runtime, mcore_compat
from .ckpt_reader import CheckpointReader, Chunk, resolve
from .config import XLSTMConfig
from .init import initialize
from .model import XLSTMModel
from .pieces import named_pieces

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
        **mcore_compat.QUIET,
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


def single_process_groups() -> ProcessGroupCollection:
    """Process groups of one process, for tools that run a model outside a distributed job."""
    cpu_runtime.activate()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        mcore_compat.seed_parallel(0)
    return ProcessGroupCollection.use_mpu_process_groups()


def inference_groups() -> ProcessGroupCollection:
    """Process groups for running a trained model: all processes of the launcher share its heads.

    Under torchrun (WORLD_SIZE above 1) the tensor-parallel size is the number of processes;
    without a launcher this is :func:`single_process_groups`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return single_process_groups()
    cpu_runtime.activate()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(**cpu_runtime.process_group_options())
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            torch.distributed.get_world_size(), create_gloo_process_groups=False
        )
        mcore_compat.seed_parallel(0)
    return ProcessGroupCollection.use_mpu_process_groups()


def load_model(path: Path | str, *, precision: str = "fp32") -> tuple[XLSTMModel, XLSTMConfig]:
    """The model of a checkpoint, weights only, in evaluation mode.

    In one process, or tensor parallel over all processes of a launcher (`inference_groups`).

    Args:
        path: a checkpoint, or a run folder (then its newest complete checkpoint).
        precision: "fp32" or "bf16".

    Raises:
        CheckpointFormatError: no complete checkpoint, or it holds another model.
    """
    groups = inference_groups()
    with CheckpointReader(resolve(path)) as reader:
        section = dict(reader.manifest.config["model"])
        section["pattern"] = section["pattern"].replace("|", "")  # there is one stage
        config = make_config(section, precision=precision, tensor=groups.tp.size())
        (model,) = build_model(config, groups, seed=0)
        for _, parameter, pieces in named_pieces(model):
            for piece in pieces:
                view = piece.local(parameter.detach())
                reader.read_into(Chunk(piece.name, piece.global_shape, piece.global_offset, view))
    return model.eval(), config


@torch.no_grad()
def model_logits(model: XLSTMModel, tokens: Tensor) -> Tensor:
    """Logits ``[b, s, vocab]`` (fp32) of int64 ``tokens [b, s]``, the same on every rank."""
    model.eval()
    return gather_vocabulary(model, model(tokens.to(cpu_runtime.device())))


def gather_vocabulary(model: XLSTMModel, logits: Tensor) -> Tensor:
    """Whole rows ``[..., vocab]`` from every tensor-parallel rank's ``[..., vocab/tp]``."""
    group = model.tp_group
    return tensor_parallel.gather_from_tensor_model_parallel_region(logits, group=group)
