"""The norm over each head, and that of a residual sum."""

from xlstm_kernels.norm.norm import add_norm, multihead_norm

__all__ = ["add_norm", "multihead_norm"]
