"""One residual layer: a mixer and, where the block has one, a feed-forward part."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.megatron import compat
from xlstm_mcore.mixers.attention import AttentionMixer
from xlstm_mcore.mixers.mamba2 import Mamba2Mixer
from xlstm_mcore.mixers.mlstm import MLSTMMixer
from xlstm_mcore.mixers.mlstm_classic import ClassicMLSTMMixer
from xlstm_mcore.mixers.slstm import LSTMMixer, SLSTMMixer
from xlstm_mcore.modules.feed_forward import FeedForward
from xlstm_mcore.modules.norm import Norm
from xlstm_mcore.recompute import selective


@dataclass
class XLSTMLayerSubmodules:
    """The parts of a layer, as Megatron ModuleSpecs.

    Attributes:
        mixer: The sequence mixer.
        feed_forward: The feed-forward part, or None for blocks without one.
    """

    mixer: ModuleSpec
    feed_forward: ModuleSpec | None = None


def layer_spec(letter: str, config: XLSTMConfig) -> ModuleSpec:
    """The ModuleSpec of a layer for one letter of the pattern (see `XLSTMConfig.pattern`)."""
    swiglu = ModuleSpec(FeedForward, params={"width": config.ffn_dim, "activation": "silu"})
    width = config.slstm_ffn_dim
    geglu = ModuleSpec(FeedForward, params={"width": width, "activation": "gelu"})
    after_slstm = geglu if width else None
    submodules = {
        "M": XLSTMLayerSubmodules(ModuleSpec(MLSTMMixer), swiglu),
        "m": XLSTMLayerSubmodules(ModuleSpec(ClassicMLSTMMixer)),
        "s": XLSTMLayerSubmodules(ModuleSpec(SLSTMMixer), after_slstm),
        "l": XLSTMLayerSubmodules(ModuleSpec(LSTMMixer), after_slstm),
        "d": XLSTMLayerSubmodules(ModuleSpec(Mamba2Mixer)),
        "*": XLSTMLayerSubmodules(ModuleSpec(AttentionMixer), swiglu),
    }
    return ModuleSpec(XLSTMLayer, submodules=submodules[letter])


def of_sequence(x: Tensor, shape: torch.Size) -> Tensor:
    """Tokens `[s(/tp) * b, h]` as the activations `[s(/tp), b, h]` that stages exchange.

    Megatron's schedules free a stage's output once it is sent, and refuse what autograd knows as a
    view. Nothing else holds the tokens, so that this one need not be known as a view.
    """
    return torch.ops.aten._unsafe_view(x, shape)


class XLSTMLayer(MegatronModule):
    """`x + mixer(norm(x))` and then, where present, `x + feed_forward(norm(x))`.

    Without `config.residual` the sums are left out. Tokens are rows, as products take them, from
    the first layer of a stage to its last one.

    Args:
        config: The model's configuration.
        submodules: The layer's parts.
        pg_collection: Process groups.
        layer_number: Number of the layer in the whole model, from 0.
    """

    def __init__(
        self,
        config: XLSTMConfig,
        submodules: XLSTMLayerSubmodules,
        pg_collection: ProcessGroupCollection,
        layer_number: int,
    ) -> None:
        super().__init__(config)
        prefix = f"decoder.layers.{layer_number}."
        self.layer_number = layer_number
        full = config.layer_letters[layer_number] in config.recompute_full_blocks
        self.recompute = "full" if full else config.recompute
        self.mixer_norm = Norm(config, f"{prefix}mixer_norm.weight")
        self.mixer = build_module(
            submodules.mixer,
            config=config,
            pg_collection=pg_collection,
            prefix=f"{prefix}mixer.",
        )
        # The cell is a small part of a 7B-style block, and half of a classic one.
        self.reruns_cell = config.recompute == "cells" or isinstance(self.mixer, MLSTMMixer)
        self.ffn = None
        if submodules.feed_forward is not None:
            self.ffn_norm = Norm(config, f"{prefix}ffn_norm.weight")
            self.ffn = build_module(
                submodules.feed_forward,
                config=config,
                pg_collection=pg_collection,
                prefix=f"{prefix}ffn.",
            )

    def forward(
        self, x: Tensor, batch: int, boundaries: Tensor | None, cache: dict | None = None
    ) -> Tensor:
        """`x [s(/tp) * b, h]` to the same shape.

        Args:
            x: The residual stream, in the order of the sequence, then of the batch.
            batch: `b`.
            boundaries: Bool `[b, s]`, True at the first token of a document, or None.
            cache: This layer's state between calls when generating, or None; read and updated.
        """
        if not torch.is_grad_enabled() or cache is not None or self.recompute == "none":
            return self._forward(x, batch, boundaries, cache)
        if self.recompute == "full":
            return tensor_parallel.checkpoint(
                lambda x: self._forward(x, batch, boundaries), False, x
            )
        with selective(cells=self.reruns_cell):
            return self._forward(x, batch, boundaries)

    def borrowed_weights(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        """Modules whose backward pass needs a weight that is not theirs, each with that weight.

        Selective recompute does not keep the output of a norm. The module that reads it computes it
        again, with the norm's weight, before the backward pass comes to the norm itself.
        """
        if self.recompute in ("selective", "cells"):
            yield self.mixer, self.mixer_norm.weight
            if self.ffn is not None:
                yield self.ffn, self.ffn_norm.weight

    def _forward(
        self, x: Tensor, batch: int, boundaries: Tensor | None, cache: dict | None = None
    ) -> Tensor:
        if self.config.residual:
            x, normed = self.mixer_norm(x, beside=True)
        else:
            normed = self.mixer_norm(x)
        mixed = self.mixer(normed, batch, boundaries, cache)
        if self.ffn is None:
            return self._add(x, mixed)
        if self.config.residual:
            x, normed = self.ffn_norm(x, self._dropout(mixed))  # sum and norm in one pass
        else:
            x = self._dropout(mixed)
            normed = self.ffn_norm(x)
        return self._add(x, self.ffn(normed))

    def _add(self, x: Tensor, change: Tensor) -> Tensor:
        change = self._dropout(change)
        return x + change if self.config.residual else change

    def _dropout(self, x: Tensor) -> Tensor:
        if not (self.training and self.config.dropout):
            return x
        if self.config.sequence_parallel:  # each rank holds other tokens: draw other masks
            with compat.parallel_rng():
                return F.dropout(x, self.config.dropout)
        return F.dropout(x, self.config.dropout)
