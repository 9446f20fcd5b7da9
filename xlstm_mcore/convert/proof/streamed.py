"""Models of which one part is in memory at a time: embedding, one layer after the other, head.

A hook before a part's forward pass reads its weights, and one after it lets them go. So the logits
of a model that is larger than the memory can be compared with those of another.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from xlstm_io.checkpoint.reader import CheckpointReader, TensorSlice
from xlstm_io.errors import first_line
from xlstm_io.tensor_files import TensorFiles
from xlstm_mcore.build import make_config
from xlstm_mcore.convert.errors import ConvertError
from xlstm_mcore.inference import model_logits, single_process_groups
from xlstm_mcore.model import XLSTMModel
from xlstm_mcore.parameters.slices import named_slices, slices_of
from xlstm_mcore.settings import ModelConfig


def our_logits(
    reader: CheckpointReader, model: ModelConfig, dtype: torch.dtype, *, nudged: bool = False
) -> Callable[[Tensor], Tensor]:
    """Logits `[b, s, vocab]` of tokens `[b, s]` by this project's model, fp32.

    Args:
        reader: The checkpoint.
        model: Its model.
        dtype: Type to which the weights are rounded before they are used.
        nudged: Change what the embedding gives by about one unit in the last place. How much the
            logits change then is how exactly fp32 defines them.
    """

    def load(part: nn.Module, *_: Any) -> None:
        for parameter in part.parameters():
            parameter.data = torch.empty(shapes[parameter], dtype=torch.float32)
            for cut in slices_of(parameter):
                view = cut.local(parameter.data)
                reader.read_into(TensorSlice(cut.name, cut.global_shape, cut.global_offset, view))
            if dtype != torch.float32:
                parameter.data.copy_(parameter.data.to(dtype))

    def release(part: nn.Module, *_: Any) -> None:
        for parameter in part.parameters():
            parameter.data = torch.empty(0)

    shapes: dict[nn.Parameter, torch.Size] = {}

    def built(part: nn.Module) -> None:
        for _, parameter, _ in named_slices(part):
            shapes[parameter] = parameter.shape
        release(part)

    ours = XLSTMModel(make_config(model), single_process_groups(), built=built).eval()
    parts = [ours.embedding, *ours.decoder.layers, ours.decoder.final_norm, ours.output_layer]
    for part in parts:
        # A tied head has no weight of its own and borrows the embedding's.
        tied = part is ours.output_layer and model.tie_embeddings
        weights = ours.embedding if tied else part
        part.register_forward_pre_hook(partial(_call_on, load, weights))
        part.register_forward_hook(partial(_call_on, release, weights))
    if nudged:

        def nudge(part: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            sign = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
            return output * (1 + sign * 2.0**-23)

        ours.embedding.register_forward_hook(nudge)
    return lambda tokens: model_logits(ours, tokens)


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Turn what transformers raises over a stranger's folder into a ConvertError.

    Code in a folder is never run: the classes of our own exports are registered.
    """
    try:
        yield
    except Exception as error:  # whatever a class of transformers may raise
        first = first_line(error)[:200]
        raise ConvertError(
            f"transformers cannot load {folder}: {first} (code in the folder is not run: "
            "trust_remote_code stays off)"
        ) from error


def their_model(folder: Path, tensors: TensorFiles) -> PreTrainedModel:
    """The exported model by transformers, fp32, in evaluation mode.

    Args:
        folder: The export.
        tensors: Its weights, which must stay open.

    Raises:
        ConvertError: transformers cannot load it.
    """
    with loading(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            ).eval()
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            model.set_submodule(name, type(module)(config))  # rotary positions, computed anew

    def load(part: nn.Module, prefix: str) -> None:
        weights = {}
        for name, _ in part.named_parameters():
            key = f"{prefix}.{name}"
            if key not in tensors.infos and config.tie_word_embeddings:
                key = embedding
            weights[name] = tensors.read(key).to(torch.float32)
        # The tensors become the weights: a copy of the head would not fit beside it.
        part.load_state_dict(weights, strict=False, assign=True)

    names = {module: name for name, module in model.named_modules()}
    embedding = f"{names[model.get_input_embeddings()]}.weight"
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    inside = {module for layer in layers for module in layer.modules()}
    single = [
        module
        for module in model.modules()
        if module not in inside and any(True for _ in module.parameters(recurse=False))
    ]
    for part in (*layers, *single):
        part.register_forward_pre_hook(lambda part, *_: load(part, names[part]))
        part.register_forward_hook(lambda part, *_: part.to("meta") and None)
    return model


def _call_on(function: Callable[[nn.Module], None], module: nn.Module, *_: Any) -> None:
    """A hook that does something with another module than the one it is called for."""
    function(module)
