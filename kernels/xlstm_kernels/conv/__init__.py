"""The causal depthwise convolution."""

from xlstm_kernels.conv.conv import causal_conv1d

__all__ = ["causal_conv1d"]
