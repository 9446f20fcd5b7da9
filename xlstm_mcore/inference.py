"""A trained model outside of a training run: load it, and compute logits."""

import os
from pathlib import Path

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from xlstm_io.checkpoint.choose import choose
from xlstm_io.checkpoint.manifest import resolve
from xlstm_io.checkpoint.reader import CheckpointReader, TensorSlice
from xlstm_io.checkpoint.tokenizer import tokenizer_of
from xlstm_io.errors import CheckpointError
from xlstm_io.storage import Location
from xlstm_io.tokenizer.base import Tokenizer
from xlstm_mcore import hardware
from xlstm_mcore.build import build_model, make_config
from xlstm_mcore.checked_model import check_parameters, model_of
from xlstm_mcore.megatron import compat, cpu_runtime
from xlstm_mcore.model import XLSTMModel
from xlstm_mcore.modules.linear import ColumnLinear
from xlstm_mcore.parameters.slices import named_slices


def single_process_groups() -> ProcessGroupCollection:
    """Process groups of one process, for tools that run a model outside a distributed job.

    Raises:
        ConfigError: The process's current device is too old.
    """
    if not cpu_runtime.activate():
        hardware.check_device()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        compat.seed_parallel(0)
    return ProcessGroupCollection.use_mpu_process_groups()


def inference_groups() -> ProcessGroupCollection:
    """Process groups for running a trained model, tensor parallel over all processes.

    Under a launcher such as torchrun (`WORLD_SIZE` above 1) every process joins. Without one this
    is `single_process_groups`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return single_process_groups()
    cpu_runtime.activate()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(**hardware.process_group_options())
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            torch.distributed.get_world_size(), create_gloo_process_groups=False
        )
        compat.seed_parallel(0)
    return ProcessGroupCollection.use_mpu_process_groups()


def load_model(
    path: Location | str,
    *,
    which: str | None = None,
    tokenizer: Path | str | None = None,
    precision: str = "fp32",
) -> tuple[XLSTMModel, Tokenizer]:
    """The model of a checkpoint with its tokenizer; see `open_model`.

    Args:
        path: A checkpoint or a run folder, local or an fsspec URL.
        which: Which one of a run; see `xlstm_io.checkpoint.choose`.
        tokenizer: Its tokenizer's file or folder; by default the one in the checkpoint.
        precision: "fp32" or "bf16".

    Raises:
        CheckpointError: There is no complete checkpoint, or its tokenizer is missing or another.
        TokenizerFileError: The tokenizer cannot be opened.
    """
    chosen = choose(path, which)
    opened = tokenizer_of(chosen, tokenizer)
    model = open_model(chosen, precision=precision)
    check_vocabulary(opened, model.config.vocab_size)
    prepare_for_tokens(model)
    return model, opened


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check that a model has a row for every id of a tokenizer.

    Raises:
        CheckpointError: It has fewer.
    """
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{tokenizer.path} has {tokenizer.vocab_size} ids, the model only "
            f"model.vocab_size={vocab_size}; give its own tokenizer"
        )


def open_model(path: Location | str, *, precision: str = "fp32") -> XLSTMModel:
    """The model of a checkpoint, weights only, in evaluation mode.

    The model lies in this process, or is split over all processes of a launcher (see
    `inference_groups`).

    Args:
        path: A checkpoint, or a run folder (then its newest complete checkpoint).
        precision: "fp32" or "bf16".

    Raises:
        CheckpointError: There is no complete checkpoint, or it holds another model.
    """
    groups = inference_groups()
    with CheckpointReader(resolve(path)) as reader:
        section = model_of(reader.manifest, reader.path)
        check_parameters(section, reader.manifest, reader.path)
        config = make_config(section, precision=precision, layout={"tensor": groups.tp.size()})
        (model,) = build_model(config, groups, seed=None)
        for _, parameter, slices in named_slices(model):
            for part in slices:
                view = part.local(parameter.detach())
                reader.read_into(
                    TensorSlice(part.name, part.global_shape, part.global_offset, view)
                )
    return model.eval()


@torch.no_grad()
def prepare_for_tokens(model: XLSTMModel) -> None:
    """Lay the weights of a model out for products with one token at a time.

    On a CPU such a product reads a matrix of many rows up to twice as fast where its columns are
    contiguous, as MKL is built today. Shapes and values stay; results differ by rounding. Neither a
    GPU nor the narrow types gain from it.
    """
    for module in model.modules():
        if isinstance(module, ColumnLinear) and module.weight is not None:
            weight = module.weight
            if weight.device.type == "cpu" and weight.dtype == torch.float32:
                weight.data = weight.t().contiguous().t()


@torch.no_grad()
def model_logits(model: XLSTMModel, tokens: Tensor) -> Tensor:
    """Logits `[b, s, vocab]` (fp32) of int64 `tokens [b, s]`, the same on every rank."""
    model.eval()
    return gather_vocabulary(model, model(tokens.to(hardware.device())))


def gather_vocabulary(model: XLSTMModel, logits: Tensor) -> Tensor:
    """Whole rows `[..., vocab]` from every tensor-parallel rank's `[..., vocab/tp]`."""
    group = model.tp_group
    return tensor_parallel.gather_from_tensor_model_parallel_region(logits, group=group)
