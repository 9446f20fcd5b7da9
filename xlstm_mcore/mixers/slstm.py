"""The classic sLSTM mixer (xLSTM, arXiv 2405.04517, figure 10) and the LSTM, parallel by heads.

Convolution, gates and recurrence are block-diagonal over heads, so a rank needs its own channels
only: with sequence parallelism one all-to-all brings them in and one takes the result back. The
recurrence needs all positions in turn, so context parallelism too cuts heads here, not positions:
a second all-to-all, after which every rank runs the whole sequence of its `1/(tp cp)` of them.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.mixers.base import Mixer, by_sequence
from xlstm_mcore.mixers.kernel_calls import (
    head_norm_backend,
    run_conv,
    run_head_norm,
    run_lstm,
    run_slstm,
)
from xlstm_mcore.recompute import recompute_in_backward

GATES = ("igate", "fgate", "zgate", "ogate")


class SLSTMMixer(Mixer):
    """sLSTM with convolution, headwise gates and per-head norm, and without an output projection.

    See `Mixer` for the arguments.
    """

    run_cell = staticmethod(run_slstm)

    def __init__(
        self, config: XLSTMConfig, pg_collection: ProcessGroupCollection, prefix: str
    ) -> None:
        super().__init__(config, pg_collection, prefix)
        heads, width = config.num_heads, config.hidden_size
        self.num_heads, self.head_dim = heads // self.region.size, width // heads
        d = self.head_dim

        self.conv_weight = self.conv_bias = None
        taps = config.slstm_taps
        if taps:
            self.conv_weight = self.split_parameter({"conv.weight": (width, taps)})
            self.conv_bias = self.split_parameter({"conv.bias": (width,)})
        self.gate_weight = self.split_parameter({f"{g}.weight": (heads, d, d) for g in GATES})
        self.recurrent_weight = self.split_parameter({"recurrent_weight": (4, heads, d, d)}, 1)
        self.bias = self.split_parameter({"bias": (4, heads, d)}, 1)
        self.head_norm_weight = self.split_parameter({"head_norm.weight": (width,)})

    def forward(
        self, x: Tensor, batch: int, boundaries: Tensor | None, cache: dict | None = None
    ) -> Tensor:
        """Mix along the sequence, see `Mixer`."""
        mine = self.context.local_slice  # of a parameter: the heads that this rank computes
        x = self.region.to_heads(by_sequence(x, batch))
        x = self.context.to_heads(x).transpose(0, 1)  # [b, s, heads * d]
        weight, bias = mine(self.conv_weight, 0), mine(self.conv_bias, 0)
        x_c = run_conv(self.config, x, weight, bias, boundaries, cache)
        h = self.run_cell(
            self.config,
            self._gate_preacts(x, x_c),
            mine(self.recurrent_weight, 1),
            mine(self.bias, 1),
            boundaries,
            cache,
            observe=self.observe,
        )
        h = recompute_in_backward(
            self._head_norm,
            h,
            mine(self.head_norm_weight, 0),
            keeps_inputs_only=head_norm_backend(self.config, h) != "torch",
        )
        h = self.region.from_heads(self.context.from_heads(h.transpose(0, 1)))
        return h.flatten(0, 1)

    def _head_norm(self, h: Tensor, weight: Tensor) -> Tensor:
        return run_head_norm(self.config, h, weight).flatten(2)

    def _gate_preacts(self, x: Tensor, x_c: Tensor) -> Tensor:
        """`[b, s, 4, heads, d]`: i and f from the convolved input, z and o from the input."""
        b, s, _ = x.shape
        d = self.head_dim
        weight = self.context.local_slice(self.gate_weight.view(2, 2, self.num_heads, d, d), 2)
        heads = weight.shape[2]
        parts = []
        for source, pair in zip((x_c, x), weight, strict=True):
            rows = source.reshape(b * s, heads, d).transpose(0, 1)
            columns = pair.permute(1, 3, 0, 2).flatten(2)  # [heads, in, 2 * out]
            product = torch.bmm(rows, columns).view(heads, b, s, 2, d)
            parts.append(product.permute(1, 2, 3, 0, 4))
        return torch.cat(parts, dim=2)


class LSTMMixer(SLSTMMixer):
    """The same block around the LSTM's cell: the paper's baseline "LSTM (Block)"."""

    run_cell = staticmethod(run_lstm)
