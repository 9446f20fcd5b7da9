"""The sLSTM cell: scalar memory, exponential input gate, recurrent weights within each head."""

from xlstm_kernels.slstm.scan import slstm_scan
from xlstm_kernels.slstm.step import slstm_step

__all__ = ["slstm_scan", "slstm_step"]
