"""The 7B-style mLSTM mixer (xLSTM 7B, arXiv 2503.13427, figure 8).

Tensor parallel by heads; context-parallel ranks pass the cell's state (parallel/mlstm_state.py).

`q, k, v, o = W x`; `i, f = cap(W_g x + b_g)`; `y = W_out(sigmoid(o) * norm(mLSTM(q, k, v)))`.
"""

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from xlstm_kernels import multihead_norm_again
from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.mixers.base import Mixer
from xlstm_mcore.mixers.kernel_calls import (
    gate_weight,
    head_norm_backend,
    run_head_norm,
    run_mlstm,
)
from xlstm_mcore.modules.projections import HeadProjections, Heads


class MLSTMMixer(Mixer):
    """mLSTM with its projections, gates and per-head norm; see `Mixer` for the arguments."""

    def __init__(
        self, config: XLSTMConfig, pg_collection: ProcessGroupCollection, prefix: str
    ) -> None:
        super().__init__(config, pg_collection, prefix)
        heads, qk, v = config.num_heads, config.qk_dim, config.v_dim
        self.num_heads = heads // self.region.size
        self.qk_head_dim, self.v_head_dim = qk // heads, v // heads

        self.in_proj = self.input_projection(
            {"q_proj.weight": qk, "k_proj.weight": qk, "v_proj.weight": v, "ogate.weight": v},
            HeadProjections,
        )
        shape = heads, config.hidden_size
        self.gate_weight = self.split_parameter({"igate.weight": shape, "fgate.weight": shape})
        self.gate_bias = self.split_parameter({"igate.bias": (heads,), "fgate.bias": (heads,)})
        self.head_norm_weight = self.split_parameter({"head_norm.weight": (v,)})
        self.out_proj = self.output_projection(v)

    def forward(
        self, x: Tensor, batch: int, boundaries: Tensor | None, cache: dict | None = None
    ) -> Tensor:
        """Mix along the sequence, see `Mixer`."""
        x = self.gathered(x)
        dims = self.qk_head_dim, self.qk_head_dim, self.v_head_dim, self.v_head_dim
        q, k, v, ogate, igate, fgate = self.in_proj(
            x,
            gate_weight(self.config, self.gate_weight),
            self.gate_bias,
            Heads(batch, self.num_heads, dims),
        )

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
            self.config.gate_soft_cap,
            observe=self.observe,
        )
        backend = head_norm_backend(self.config, h)
        return self.out_proj(
            h,
            self.head_norm_weight,
            ogate,
            function=self._output,
            keeps_inputs_only=backend != "torch",
            again=self._again if backend == "triton" else None,
        )[0]

    def _output(self, h: Tensor, norm_weight: Tensor, ogate: Tensor) -> Tensor:
        """`sigmoid(o) * norm(h)`, `[s * b, heads * d]`, of `h` and `ogate [b, heads, s, d]`."""
        return run_head_norm(self.config, h, norm_weight, ogate, layout="by head")

    def _again(
        self, d_output: Tensor, h: Tensor, norm_weight: Tensor, ogate: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        kind, eps = self.config.head_norm, self.config.norm_eps
        return d_output, multihead_norm_again(d_output, h, norm_weight, kind, eps, ogate)
