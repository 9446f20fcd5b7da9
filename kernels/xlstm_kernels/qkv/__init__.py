"""Queries, keys, values and gates of the classic mLSTM block."""

from xlstm_kernels.qkv.qkv import qkv_and_gates

__all__ = ["qkv_and_gates"]
