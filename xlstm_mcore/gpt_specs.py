"""The same layers inside megatron-core's own `GPTModel`, for an unmodified Megatron-LM.

    model = GPTModel(
        config=config,  # an XLSTMConfig
        transformer_layer_spec=gpt_layer_spec(config, pp_rank=..., vp_stage=...),
        vocab_size=config.vocab_size,
        max_sequence_length=seq_len,
        share_embeddings_and_output_weights=config.tie_embeddings,
        position_embedding_type="none",
        pg_collection=groups,
    )
    prepare_gpt_model(model, config, seed)

Document boundaries come from what Megatron-LM gives its layers: the attention mask of
`--reset-attention-mask`, of which the first subdiagonal is read, or `packed_seq_params`.
Megatron-LM distributes the layers over pipeline stages itself, so the pattern's cuts have no
effect. Its checkpoints hold our layers under our global names (ARCHITECTURE.md), so they too load
at any layout.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from xlstm_mcore import hardware
from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.layer import XLSTMLayer, XLSTMLayerSubmodules, layer_spec, of_sequence
from xlstm_mcore.model import set_vocabulary_slice
from xlstm_mcore.modules.norm import Norm
from xlstm_mcore.modules.soft_cap import soft_cap
from xlstm_mcore.parameters.init import initialize
from xlstm_mcore.parameters.names import EMBEDDING, FINAL_NORM, OUTPUT
from xlstm_mcore.parameters.slices import ParameterSlice, named_slices


def gpt_layer_spec(
    config: XLSTMConfig, pp_rank: int = 0, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, as `GPTModel` takes them (`transformer_layer_spec`).

    Args:
        config: The model's configuration.
        pp_rank: This process's pipeline rank.
        vp_stage: Index of this model chunk on its rank, with interleaved stages.
    """
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    number = get_num_layers_to_build(config, vp_stage, pp_rank)
    letters = config.layer_letters[first : first + number]
    return TransformerBlockSubmodules(
        layer_specs=[
            ModuleSpec(GPTLayer, submodules=layer_spec(letter, config).submodules)
            for letter in letters
        ],
        layer_norm=FinalNorm,
    )


def prepare_gpt_model(model: GPTModel, config: XLSTMConfig, seed: int) -> None:
    """Finish a `GPTModel` (or one stage of it): names, the logits' soft cap, initial weights.

    Afterwards every parameter has its slices (parameters/slices.py), so that weight decay, the
    count of parameters and tools that go by names see the same model as `XLSTMModel`. With the same
    seed it has the same weights.

    Args:
        model: A model of `gpt_layer_spec`.
        config: Its configuration.
        seed: Seed of the initial weights.
    """
    group = model.pg_collection.tp
    if model.pre_process:
        set_vocabulary_slice(model.embedding.word_embeddings.weight, EMBEDDING, config, group)
    if model.post_process:
        if model.output_layer.weight is not None:
            name = EMBEDDING if config.tie_embeddings else OUTPUT
            set_vocabulary_slice(model.output_layer.weight, name, config, group)
        if config.logit_soft_cap is not None:
            model.output_layer.register_forward_hook(
                lambda layer, inputs, output: (
                    soft_cap(output[0], config.logit_soft_cap),
                    *output[1:],
                )
            )
    initialize(model, config, seed)


class GPTLayer(XLSTMLayer):
    """An `XLSTMLayer` with the signature of megatron-core's `TransformerLayer`.

    Args:
        config: The model's configuration.
        submodules: The layer's parts.
        layer_number: Number of the layer on this pipeline stage, from 1.
        pg_collection: Process groups.
        vp_stage: Index of this model chunk on its rank, with interleaved stages.

    Raises:
        ValueError: There are several context-parallel ranks. Megatron-LM cuts rows in another way.
    """

    def __init__(
        self,
        config: XLSTMConfig,
        submodules: XLSTMLayerSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        if pg_collection.cp.size() > 1:
            raise ValueError(
                f"context_parallel_size={pg_collection.cp.size()}: Megatron-LM gives a rank one "
                "slice from each half of a row, and a recurrence needs contiguous slices in order; "
                "use context_parallel_size=1, or layout.context of python -m pretrain"
            )
        first = get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())
        super().__init__(config, submodules, pg_collection, first + layer_number - 1)
        self.layer_number = first + layer_number  # megatron-core counts from 1
        self.pg_collection = pg_collection

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """`hidden_states [s(/tp), b, h]` to the same shape, and no cross-attention context.

        Args:
            hidden_states: The residual stream.
            attention_mask: Bool `[b or 1, 1, s, s]`, True where attention is forbidden, or None.
            packed_seq_params: Megatron's description of one packed row, or None.
            unused: What other layers need (rotary embeddings, contexts of cross-attention).
        """
        boundaries, shape = None, hidden_states.shape
        if packed_seq_params is not None:
            ranks = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
            boundaries = _from_lengths(packed_seq_params, ranks * shape[0])
        elif attention_mask is not None:
            boundaries = _from_mask(attention_mask, shape[1])
        out = super().forward(hidden_states.flatten(0, 1), shape[1], boundaries)
        return of_sequence(out, shape), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensorFactory]:
        """What Megatron-LM's checkpoints save and load of this layer.

        Megatron takes a parameter that no Megatron layer owns for a replicated one. Under tensor
        parallelism it would save one rank's shard as the whole.

        Args:
            prefix: Prefix of the keys of this module's state dict.
            sharded_offsets: Unused; names carry the number of the layer.
            metadata: Unused.
        """
        tp, dp_cp = self.pg_collection.tp.rank(), self.pg_collection.dp_cp.rank()
        return {
            f"{prefix}{name}": ShardedTensorFactory(
                f"{prefix}{name}",
                parameter,
                functools.partial(_slices_to_save, slices),
                functools.partial(_from_loaded_slices, slices, parameter.shape),
                (0, 0 if parameter.tensor_model_parallel else tp, dp_cp),
            )
            for name, parameter, slices in named_slices(self)
        }


class FinalNorm(Norm):
    """The final norm with the signature that megatron-core builds norms by."""

    def __init__(self, config: XLSTMConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, FINAL_NORM)


def _slices_to_save(
    slices: Sequence[ParameterSlice],
    key: str,
    tensor: Tensor,
    replica_id: Any,
    flattened_range: Any,
) -> dict[str, ShardedTensor]:
    """The slices of a parameter, or of an optimizer's tensor of its shape, by their names.

    `key` is Megatron's. It has an optimizer's prefix before the layer's name, which is kept; the
    rest of the name is that of the slice.
    """
    assert flattened_range is None, "slices of flattened parameters are not supported"
    prefix = key[: key.index("decoder.layers.")]
    return {
        str(number): ShardedTensor.from_rank_offsets(
            f"{prefix}{part.name}",
            part.local(tensor.detach()).contiguous(),
            *(
                (axis, offset // size, whole // size)
                for axis, (offset, size, whole) in enumerate(
                    zip(part.global_offset, part.shape, part.global_shape, strict=True)
                )
            ),
            replica_id=replica_id,
        )
        for number, part in enumerate(slices)  # several slices of one tensor may lie on a rank
    }


def _from_loaded_slices(
    slices: Sequence[ParameterSlice], shape: torch.Size, loaded: dict[str, Tensor]
) -> Tensor:
    tensor = next(iter(loaded.values())).new_empty(shape)
    for number, part in enumerate(slices):
        part.local(tensor).copy_(loaded[str(number)])
    return tensor


def _from_mask(mask: Tensor, rows: int) -> Tensor:
    """A document begins at a token that may not see the one before it: `[b, s]`."""
    hidden = mask[:, 0].diagonal(-1, dim1=1, dim2=2)
    first = hidden.new_zeros(len(hidden), 1)
    return torch.cat((first, hidden), dim=1).expand(rows, -1)


def _from_lengths(packed: PackedSeqParams, length: int) -> Tensor:
    """Boundaries `[1, s]`, at the documents' first tokens, in a packed row of `length` tokens.

    Where documents are padded the padding counts as theirs. Documents may be empty, as where the
    end of the row is repeated to fill the tensor.
    """
    starts = packed.cu_seqlens_q_padded
    starts = packed.cu_seqlens_q if starts is None else starts
    boundaries = torch.zeros(1, length + 1, dtype=torch.bool, device=hardware.device())
    boundaries[0, starts.long()] = True
    return boundaries[:, :length]
