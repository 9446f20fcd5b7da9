"""The activation of a gated feed-forward part."""

from xlstm_kernels.gated.gated import gated_activation

__all__ = ["gated_activation"]
