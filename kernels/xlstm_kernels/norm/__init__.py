"""The norm over each head."""

from xlstm_kernels.norm.norm import multihead_norm

__all__ = ["multihead_norm"]
