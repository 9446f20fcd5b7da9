"""The Mamba-2 mixer (Dao and Gu 2024, arXiv 2405.21060), a baseline, on the mLSTM's kernel.

Its state space recurrence `S = exp(-dt A) S + dt x B^T`, `y = S C + D x` is the mLSTM's with
q = C, k = B, v = dt x, an open input gate and no normaliser. The forget gate is a sigmoid there, so
its pre-activation is the logit of `exp(-dt A)`.

Tensor parallel by heads. B and C are shared by all heads: each rank computes a part of their
channels, and one all-gather completes them. The norm before the output sees all channels, for which
ranks add up one number per token.
"""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.mixers.base import Mixer, by_sequence
from xlstm_mcore.mixers.kernel_calls import run_conv, run_mamba2


class Mamba2Mixer(Mixer):
    """Mamba-2 with one group of B and C; see `Mixer` for the arguments."""

    def __init__(
        self, config: XLSTMConfig, pg_collection: ProcessGroupCollection, prefix: str
    ) -> None:
        super().__init__(config, pg_collection, prefix)
        inner, state = config.ssm_dim, config.ssm_state_dim
        heads, size = inner // config.ssm_head_dim, self.region.size
        self.inner, self.state, self.num_heads = inner // size, state // size, heads // size
        self.full_inner = inner

        self.in_proj = self.input_projection(
            {
                "z_proj.weight": inner,
                "x_proj.weight": inner,
                "b_proj.weight": state,
                "c_proj.weight": state,
                "dt_proj.weight": heads,
            }
        )
        self.conv_weight = self.conv_bias = None
        if config.conv_width:
            widths = {"x": inner, "b": state, "c": state}
            self.conv_weight = self.split_parameter(
                {f"{n}_conv.weight": (w, config.conv_width) for n, w in widths.items()}
            )
            self.conv_bias = self.split_parameter(
                {f"{n}_conv.bias": (w,) for n, w in widths.items()}
            )
        self.a_log = self.split_parameter({"a_log": (heads,)})
        self.dt_bias = self.split_parameter({"dt_bias": (heads,)})
        self.skip = self.split_parameter({"skip": (heads,)})
        self.norm_weight = self.split_parameter({"gated_norm.weight": (inner,)})
        self.out_proj = self.output_projection(inner)

    def forward(
        self, x: Tensor, batch: int, boundaries: Tensor | None, cache: dict | None = None
    ) -> Tensor:
        """Mix along the sequence, see `Mixer`."""
        x = self.gathered(x)
        inner, state, heads = self.inner, self.state, self.num_heads
        projected = by_sequence(self.in_proj(x)[0], batch).transpose(0, 1)  # [b, s, ...]
        z, xbc, dt = projected.split([inner, inner + 2 * state, heads], dim=-1)
        conv = self.conv_weight, self.conv_bias
        xbc = run_conv(self.config, xbc, *conv, boundaries, cache, self.context)
        x_, bc = xbc.split([inner, 2 * state], dim=-1)
        b, c = self.region.gather_columns(bc.unflatten(-1, (2, state))).unbind(-2)  # [b, s, N]

        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))  # [b, s, heads]
        values = x_.unflatten(-1, (heads, -1))
        h = run_mamba2(
            self.config,
            self._of_all_heads(c * c.shape[-1] ** 0.5),  # the kernel divides by this root
            self._of_all_heads(b),
            (values * dt[..., None]).to(x_.dtype).transpose(1, 2).contiguous(),
            decay_logit(dt * self.a_log.to(wide).exp()).transpose(1, 2).contiguous(),
            boundaries,
            cache,
            self.context,
        )
        y = h.transpose(1, 2) + self.skip[:, None] * values
        y = self._gated_norm(y.flatten(2), z)
        return self.out_proj(y.transpose(0, 1).flatten(0, 1))[0]

    def _of_all_heads(self, t: Tensor) -> Tensor:
        """`[b, s, N]`, which the heads share, as the kernel reads it: `[b, heads, s, N]`."""
        return t[:, None].expand(-1, self.num_heads, -1, -1).contiguous()

    def _gated_norm(self, y: Tensor, z: Tensor) -> Tensor:
        """RMS norm of `y silu(z)` over the channels of all ranks, `[b, s, inner/tp]`."""
        y = (y * F.silu(z)).to(torch.promote_types(y.dtype, torch.float32))
        mean = self.region.sum(y.square().sum(-1, keepdim=True)) / self.full_inner
        return (y * torch.rsqrt(mean + self.config.norm_eps)).to(z.dtype) * self.norm_weight


def decay_logit(exponent: Tensor) -> Tensor:
    """The x with `sigmoid(x) = exp(-exponent)`, for exponents from 0 to infinity.

    It is `-log(exp(exponent) - 1)`, in a form that neither overflows nor cancels. An exponent below
    1e-20 counts as that: the decay is 1 to the last bit either way, and the gradient stays finite.
    """
    exponent = exponent.clamp(min=1e-20)
    return -(exponent + torch.log(-torch.expm1(-exponent)))
