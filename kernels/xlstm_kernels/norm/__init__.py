"""The norm over each head, that of a residual sum, and one with a skip and a gate behind it."""

from xlstm_kernels.norm.norm import add_norm, multihead_norm, multihead_norm_again, norm_beside
from xlstm_kernels.norm.skip import norm_gated_skip, norm_gated_skip_again

__all__ = [
    "add_norm",
    "multihead_norm",
    "multihead_norm_again",
    "norm_beside",
    "norm_gated_skip",
    "norm_gated_skip_again",
]
