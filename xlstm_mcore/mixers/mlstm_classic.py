"""The classic mLSTM mixer (xLSTM, arXiv 2405.04517, figure 11), tensor parallel by heads.

Pre up-projection, causal convolution, block-diagonal q, k, v, gates that see all heads, a learnable
skip and an output gate. The gates are the only place where heads meet: each rank adds its columns'
part, and one small sum over ranks (2 numbers per head and token) completes them. Context-parallel
ranks pass the cell's state (parallel/mlstm_state.py) and the convolution's last inputs.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from xlstm_kernels import conv_qkv_and_gates, norm_gated_skip_again, qkv_and_gates
from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.mixers.base import Mixer, by_sequence
from xlstm_mcore.mixers.kernel_calls import (
    gate_weight,
    head_norm_backend,
    own_backend,
    run_conv,
    run_mlstm,
    run_norm_gated_skip,
)
from xlstm_mcore.parameters.slices import ParameterSlice, new_parameter


class ClassicMLSTMMixer(Mixer):
    """Classic mLSTM with pre up-projection; see `Mixer` for the arguments."""

    def __init__(
        self, config: XLSTMConfig, pg_collection: ProcessGroupCollection, prefix: str
    ) -> None:
        super().__init__(config, pg_collection, prefix)
        inner, heads, block = config.up_dim, config.num_heads, config.qkv_block_size
        self.inner, self.num_heads = inner // self.region.size, heads // self.region.size
        self.head_dim = inner // heads

        self.in_proj = self.input_projection({"up_proj.weight": inner, "z_proj.weight": inner})
        self.conv_weight = self.conv_bias = None
        if config.conv_width:
            self.conv_weight = self.split_parameter({"conv.weight": (inner, config.conv_width)})
            self.conv_bias = self.split_parameter({"conv.bias": (inner,)})
        # [q blocks, k blocks, v blocks], each block (out, in)
        self.qkv_weight = self.split_parameter(
            {f"{n}_proj.weight": (inner // block, block, block) for n in "qkv"}
        )
        self.igate_weight = self._gate_weight(f"{prefix}igate.weight")
        self.fgate_weight = self._gate_weight(f"{prefix}fgate.weight")
        self.gate_bias = self.split_parameter({"igate.bias": (heads,), "fgate.bias": (heads,)})
        self.head_norm_weight = self.split_parameter({"head_norm.weight": (inner,)})
        self.learnable_skip = self.split_parameter({"learnable_skip": (inner,)})
        self.out_proj = self.output_projection(inner)

    def _gate_weight(self, name: str) -> nn.Parameter:
        """Weight `[heads, 3 * inner]` of a gate, of which a rank holds its q, k, v columns."""
        heads, inner, mine = self.config.num_heads, self.config.up_dim, self.inner
        slices = [
            ParameterSlice(
                name,
                (heads, 3 * inner),
                (0, part * inner + self.region.rank * mine),
                (0, part * mine),
                (heads, mine),
            )
            for part in range(3)
        ]
        return new_parameter(self.config, slices)

    def forward(
        self, x: Tensor, batch: int, boundaries: Tensor | None, cache: dict | None = None
    ) -> Tensor:
        """Mix along the sequence, see `Mixer`."""
        x = self.gathered(x)
        projected = by_sequence(self.in_proj(x)[0], batch)
        of_gates = gate_weight(self.config, torch.cat((self.igate_weight, self.fgate_weight)))
        x_c, z, q, k, v, partial = self._before_cell(
            projected.transpose(0, 1), of_gates, boundaries, cache
        )
        igate, fgate = self._gates(partial)
        h = run_mlstm(
            self.config,
            q,
            k,
            v,
            igate,
            fgate,
            boundaries,
            cache,
            self.context,
            observe=self.observe,
        )
        inputs = h, self.head_norm_weight, self.learnable_skip, x_c, z.transpose(0, 1)
        kernel = head_norm_backend(self.config, h) == "triton"
        return self.out_proj(
            *inputs,
            function=self._output,
            keeps_inputs_only=kernel,
            again=self._again if kernel else None,
        )[0]

    def _before_cell(
        self,
        projected: Tensor,
        of_gates: Tensor,
        boundaries: Tensor | None,
        cache: dict | None,
    ) -> tuple[Tensor, ...]:
        """Convolved input, output gate, q, k, v and gates; see `conv_qkv_and_gates`.

        `projected` is `[b, s, 2 * inner]`, and `of_gates` the weight of the cell's gates.
        """
        x, z = projected.chunk(2, dim=-1)
        conv = self.conv_weight, self.conv_bias
        weights = self.qkv_weight, of_gates, self.num_heads
        backend = own_backend(self.config)
        if self.conv_weight is None or cache is not None:
            x_c = run_conv(self.config, x, *conv, boundaries, cache, self.context)
            return x_c, z, *qkv_and_gates(x_c, x, *weights, backend=backend)
        before = self.context.tokens_before(x, self.conv_weight.shape[1] - 1, boundaries)
        boundaries = self.context.local_slice(boundaries)
        return conv_qkv_and_gates(
            projected, *conv, *weights, before, boundaries=boundaries, backend=backend
        )

    def _output(
        self, h: Tensor, norm_weight: Tensor, skip: Tensor, x_c: Tensor, z: Tensor
    ) -> Tensor:
        """`(norm(h) + skip * x_c) * silu(z)`, `[s * b, inner]`.

        `h` is `[b, heads, s, d]`, `x_c` `[b, s, inner]` and `z` `[s, b, inner]`.
        """
        x_c = x_c.transpose(0, 1)
        return run_norm_gated_skip(self.config, h, norm_weight, skip, x_c, z).flatten(0, 1)

    def _again(
        self,
        d_output: Tensor,
        h: Tensor,
        norm_weight: Tensor,
        skip: Tensor,
        x_c: Tensor,
        z: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        options = self.config.head_norm, self.config.norm_eps
        d_h, d_weight, d_skip, d_x, d_z = norm_gated_skip_again(
            d_output.view(z.shape), h, norm_weight, *options, skip, x_c.transpose(0, 1), z
        )
        return d_output, (d_h, d_weight, d_skip, d_x.transpose(0, 1), d_z)

    def _gates(self, partial: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations of both gates, `[b, heads/tp, s]`, from this rank's part of all heads'.

        `partial` is `[b, s, 2 * heads]`: the input gates, then the forget gates.
        """
        b, s, _ = partial.shape
        by_head = partial.view(b, s, 2, -1).transpose(2, 3).reshape(b, s, -1)  # i, f of each head
        mine = self.region.sum_and_split(by_head).view(b, s, self.num_heads, 2)
        preacts = mine + self.gate_bias.to(mine.dtype).view(2, self.num_heads).t()
        igate, fgate = preacts.permute(3, 0, 2, 1)
        return igate, fgate
