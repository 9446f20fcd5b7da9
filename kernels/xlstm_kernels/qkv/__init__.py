"""Queries, keys, values and gates of the classic mLSTM block."""

from xlstm_kernels.qkv.convolved import conv_qkv_and_gates
from xlstm_kernels.qkv.qkv import qkv_and_gates

__all__ = ["conv_qkv_and_gates", "qkv_and_gates"]
