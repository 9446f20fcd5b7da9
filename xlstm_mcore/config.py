"""`XLSTMConfig`: Megatron's configuration of a model, around the sections of a run file."""

from dataclasses import dataclass, field
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from xlstm_mcore.pattern import parse_pattern
from xlstm_mcore.settings import MemoryConfig, ModelConfig
from xlstm_mcore.sizes.dimensions import dimensions


@dataclass(kw_only=True)
class XLSTMConfig(TransformerConfig):
    """An xLSTM language model as Megatron-core sees it.

    The keys of both sections can be read as if they were fields of this class: `config.norm` is
    `config.model.norm`, and `config.recompute` is `config.memory.recompute`. The fields that
    Megatron reads itself follow from them: `hidden_size`, `num_layers`, `num_attention_heads` and
    `hidden_dropout`.

    Attributes:
        model: the architecture.
        memory: what the backward pass computes again.
    """

    model: ModelConfig
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def __post_init__(self) -> None:
        """Derive Megatron's own fields from the model."""
        self.hidden_size = self.model.hidden_size
        self.num_layers = len(self.layer_letters)
        self.num_attention_heads = self.model.num_heads
        self.hidden_dropout = self.model.dropout
        super().__post_init__()

    def __getattr__(self, name: str) -> Any:
        """A key of one of the sections; called only for what is not a field or method."""
        for section in ("model", "memory"):
            # Read from `__dict__`: a copy in the making has no sections yet. A section's `__dict__`
            # holds its keys alone. Every block reads some for every token that it generates.
            keys = self.__dict__.get(section)
            if keys is not None and name in keys.__dict__:
                return keys.__dict__[name]
        raise AttributeError(
            f"XLSTMConfig has no field {name!r}, and its sections have no such key"
        )

    @property
    def layer_letters(self) -> list[str]:
        """One letter per layer, over all pipeline stages."""
        return list(parse_pattern(self.model.pattern).letters)

    @property
    def qk_dim(self) -> int:
        """Width of q and k over all heads (7B-style block)."""
        return dimensions(self.model).qk

    @property
    def v_dim(self) -> int:
        """Width of v and of the output gate over all heads (7B-style block)."""
        return dimensions(self.model).v

    @property
    def ffn_dim(self) -> int:
        """Inner width of the 7B-style block's SwiGLU."""
        return dimensions(self.model).ffn

    @property
    def up_dim(self) -> int:
        """Inner width of the classic mLSTM block (its pre up-projection)."""
        return dimensions(self.model).up

    @property
    def slstm_ffn_dim(self) -> int:
        """Inner width of the classic sLSTM block's GeGLU, and of the LSTM block's."""
        return dimensions(self.model).slstm_ffn

    @property
    def slstm_taps(self) -> int:
        """Taps of the convolution in the sLSTM and LSTM blocks."""
        return dimensions(self.model).slstm_conv

    @property
    def ssm_dim(self) -> int:
        """Inner width of the Mamba-2 block."""
        return dimensions(self.model).mamba
