"""XLSTMModel: embedding, this pipeline stage's layers, and the language-model head."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.layer import layer_spec, of_sequence
from xlstm_mcore.modules.linear import ColumnLinear
from xlstm_mcore.modules.loss import (
    linear_cross_entropy,
    slice_bytes_of,
    vocab_parallel_cross_entropy,
)
from xlstm_mcore.modules.norm import Norm
from xlstm_mcore.modules.soft_cap import soft_cap
from xlstm_mcore.parallel.tensor import TensorParallelRegion
from xlstm_mcore.parameters.names import EMBEDDING, FINAL_NORM, OUTPUT
from xlstm_mcore.parameters.slices import set_slices, stacked_slices
from xlstm_mcore.pattern import parse_pattern


class XLSTMStack(MegatronModule):
    """The layers of one pipeline stage, and the final norm on the last.

    Args:
        config: The model's configuration.
        pg_collection: Process groups.
        layer_numbers: This stage's layers, numbered in the whole model from 0.
        post_process: Whether this is the last stage.
        built: Called with every layer, and the final norm, before the next one is made.
    """

    def __init__(
        self,
        config: XLSTMConfig,
        pg_collection: ProcessGroupCollection,
        layer_numbers: tuple[int, ...],
        post_process: bool,
        built: Callable[[nn.Module], None],
    ) -> None:
        super().__init__(config)
        letters = config.layer_letters
        self.layers = nn.ModuleList()
        for number in layer_numbers:
            layer = build_module(
                layer_spec(letters[number], config),
                config=config,
                pg_collection=pg_collection,
                layer_number=number,
            )
            built(layer)
            self.layers.append(layer)
        self.final_norm = None
        if post_process:
            self.final_norm = Norm(config, FINAL_NORM)
            built(self.final_norm)

    def forward(self, x: Tensor, boundaries: Tensor | None, cache: dict | None = None) -> Tensor:
        """`x [s(/tp), b, h]` through this stage's layers, same shape."""
        shape, x = x.shape, x.flatten(0, 1)
        for layer in self.layers:
            state = None if cache is None else cache.setdefault(layer.layer_number, {})
            x = layer(x, shape[1], boundaries, state)
        return of_sequence(x if self.final_norm is None else self.final_norm(x), shape)


class Head(ColumnLinear):
    """The output layer. It returns logits or, given labels, token losses.

    Losses are computed in this module's call because wrappers that gather weights late (DDP with
    `overlap_param_gather`) wait for a module's weights when the module is called. Logits that take
    more than `config.logits_mib` are never held as a whole (modules/loss.py).
    """

    def forward(self, x: Tensor, weight: Tensor | None = None, labels: Tensor | None = None):
        """Logits of `x [s(/tp), b, h]` as Megatron's layer returns them, or token losses.

        Args:
            x: Normalised activations.
            weight: The embedding's weight when it is tied on this stage, else None.
            labels: Int64 `[s, b]`, or None.

        Returns:
            `(logits [s, b, vocab/tp], None)`, or with labels the losses `[s, b]` (nats, fp32).
        """
        if labels is None:
            return super().forward(x, weight=weight)
        config, group = self.config, self.tp_group
        weight = self.weight if weight is None else weight
        size = labels.numel(), len(weight), x.element_size()
        slice_bytes = slice_bytes_of(*size, config.logits_mib)
        if slice_bytes is None:
            logits = super().forward(x, weight=weight)[0]
            return vocab_parallel_cross_entropy(
                logits,
                labels,
                config.logit_soft_cap,
                group,
                config.vocab_tokens,
                config.kernel_backend,
            )
        hidden = TensorParallelRegion(config, group).gather(x)
        return linear_cross_entropy(
            hidden,
            weight,
            labels,
            config.logit_soft_cap,
            group,
            slice_bytes,
            config.vocab_tokens,
            config.kernel_backend,
        )


class XLSTMModel(LanguageModule):
    """An xLSTM language model, or one pipeline stage of it, for Megatron's schedules.

    Args:
        config: The model's configuration.
        pg_collection: Process groups.
        pre_process: Whether this stage holds the embedding.
        post_process: Whether this stage holds the head.
        stage: Index of this stage in the pattern's cuts, `virtual_rank * pp + pp_rank`.
        vp_stage: Index of this model chunk on its rank, with interleaved stages.
        built: Called with every part (embedding, layer, final norm, head) as soon as it is made,
            while its parameters have no values. So only one part at a time has to be whole.
    """

    def __init__(
        self,
        config: XLSTMConfig,
        pg_collection: ProcessGroupCollection,
        pre_process: bool = True,
        post_process: bool = True,
        stage: int = 0,
        vp_stage: int | None = None,
        built: Callable[[nn.Module], None] = lambda part: None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = config.tie_embeddings

        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=config.vocab_size,
                max_sequence_length=0,
                position_embedding_type="none",
                tp_group=self.tp_group,
            )
            set_vocabulary_slice(
                self.embedding.word_embeddings.weight, EMBEDDING, config, self.tp_group
            )
            built(self.embedding)
        layers = parse_pattern(config.pattern).stages[stage]
        self.decoder = XLSTMStack(config, pg_collection, layers, post_process, built)
        if post_process:
            tied_here = config.tie_embeddings and pre_process
            self.output_layer = Head(
                config.hidden_size,
                config.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_weight_param_allocation=tied_here,
                tp_group=self.tp_group,
            )
            if not tied_here:
                name = EMBEDDING if config.tie_embeddings else OUTPUT
                set_vocabulary_slice(self.output_layer.weight, name, config, self.tp_group)
                built(self.output_layer)
        self.input_tensor: Tensor | None = None
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """Receive the activations of the stage before (called by Megatron's schedules)."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        self.input_tensor = input_tensor

    def forward(
        self,
        tokens: Tensor,
        boundaries: Tensor | None = None,
        labels: Tensor | None = None,
        cache: dict | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """One stage's forward pass.

        Args:
            tokens: Int64 `[b, s]`.
            boundaries: Bool `[b, s]`, True at the first token of a document, or None.
            labels: Int64 `[b, s]`, or None; with labels the last stage returns losses.
            cache: Layer states between calls when generating, or None; read and updated.
            last_only: Return the logits of the last position alone, `[b, 1, vocab/tp]`. A long
                prompt needs no more.

        Returns:
            Before the last stage, activations `[s(/tp), b, h]`. On the last stage, token losses
            `[b, s]` (nats, fp32), or without labels this rank's logits `[b, s, vocab/tp]`.
        """
        if self.pre_process:
            x = self.embedding(tokens, None)
        else:
            x = self.input_tensor
        x = self.decoder(x, boundaries, cache)
        if not self.post_process:
            return x
        if last_only:
            x = x[-1:]
        weight = self._tied_weight()
        if labels is not None:
            return self.output_layer(x, weight, labels.t()).t()
        logits = self.output_layer(x, weight)[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return soft_cap(logits, self.config.logit_soft_cap).transpose(0, 1)

    def _tied_weight(self) -> Tensor | None:
        """The embedding's weight, where it is the head's too and lies on this stage."""
        tied_here = self.config.tie_embeddings and self.pre_process
        return self.shared_embedding_or_output_weight() if tied_here else None


def set_vocabulary_slice(
    weight: nn.Parameter, name: str, config: XLSTMConfig, group: dist.ProcessGroup
) -> None:
    """Record that an embedding or head `[vocab/tp, h]` holds this rank's rows of tensor `name`."""
    shapes = {name: (config.vocab_size, config.hidden_size)}
    slices = stacked_slices(shapes, shard_dim=0, rank=group.rank(), size=group.size())
    set_slices(weight, slices)
