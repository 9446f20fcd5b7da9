"""The mLSTM cell: matrix memory, exponential or sigmoid input gate, sigmoid forget gate."""

from xlstm_kernels.mlstm.chunkwise import mlstm_chunkwise
from xlstm_kernels.mlstm.step import mlstm_step

__all__ = ["mlstm_chunkwise", "mlstm_step"]
