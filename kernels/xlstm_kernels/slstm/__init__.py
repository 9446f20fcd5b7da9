"""The sLSTM cell: scalar memory, exponential input gate, recurrent weights within each head.

The LSTM is beside it, which has the same recurrence and other gates.
"""

from xlstm_kernels.slstm.lstm import lstm_scan, lstm_step
from xlstm_kernels.slstm.scan import slstm_scan
from xlstm_kernels.slstm.step import slstm_step

__all__ = ["lstm_scan", "lstm_step", "slstm_scan", "slstm_step"]
