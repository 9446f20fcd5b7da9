"""Gates that are not of a cell: of feed-forward parts, and of the classic mLSTM block."""

from xlstm_kernels.gated.gated import gated_activation, gated_activation_again
from xlstm_kernels.gated.skip import gated_skip

__all__ = ["gated_activation", "gated_activation_again", "gated_skip"]
