"""Kernels of the xLSTM cells: tensors in, tensors out, no modules and no process groups.

Public functions: `mlstm_chunkwise` (training), `mlstm_step` (one token), `slstm_scan`,
`slstm_step`, `lstm_scan`, `lstm_step`, `causal_conv1d`, `multihead_norm`, `add_norm`,
`norm_beside`, `norm_gated_skip`, `gated_activation`, `gated_skip`, `qkv_and_gates`,
`conv_qkv_and_gates`, and `softmax_statistics` with `softmax_gradient`. `gated_activation_again`,
`multihead_norm_again` and `norm_gated_skip_again` are for backward passes. The specification of
each cell is its `reference.py`; every backend is tested against it in float64. Autocast changes
none of them: results are those of the dtypes of the arguments, as without it.
"""

from xlstm_kernels.conv import causal_conv1d
from xlstm_kernels.cross_entropy import softmax_gradient, softmax_statistics
from xlstm_kernels.gated import gated_activation, gated_activation_again, gated_skip
from xlstm_kernels.mlstm import mlstm_chunkwise, mlstm_step
from xlstm_kernels.norm import (
    add_norm,
    multihead_norm,
    multihead_norm_again,
    norm_beside,
    norm_gated_skip,
    norm_gated_skip_again,
)
from xlstm_kernels.qkv import conv_qkv_and_gates, qkv_and_gates
from xlstm_kernels.slstm import lstm_scan, lstm_step, slstm_scan, slstm_step

__all__ = [
    "add_norm",
    "causal_conv1d",
    "conv_qkv_and_gates",
    "gated_activation",
    "gated_activation_again",
    "gated_skip",
    "lstm_scan",
    "lstm_step",
    "mlstm_chunkwise",
    "mlstm_step",
    "multihead_norm",
    "multihead_norm_again",
    "norm_beside",
    "norm_gated_skip",
    "norm_gated_skip_again",
    "qkv_and_gates",
    "slstm_scan",
    "slstm_step",
    "softmax_gradient",
    "softmax_statistics",
]
