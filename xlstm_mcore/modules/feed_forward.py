"""The feed-forward part of a block."""

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from xlstm_kernels import gated_activation, gated_activation_again
from xlstm_kernels.gated.gated import gated_backend
from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.modules.linear import input_projection, output_projection
from xlstm_mcore.parallel.tensor import TensorParallelRegion


class FeedForward(nn.Module):
    """Gated feed-forward `down(act(gate(x)) * up(x))`: SwiGLU (7B) or GeGLU (classic sLSTM).

    Args:
        config: The model's configuration.
        pg_collection: Process groups (`tp` is read).
        prefix: Prefix of the parameters' global names.
        width: Inner width.
        activation: "silu" or "gelu".
    """

    def __init__(
        self,
        config: XLSTMConfig,
        pg_collection: ProcessGroupCollection,
        prefix: str,
        width: int,
        activation: str,
    ) -> None:
        super().__init__()
        region = TensorParallelRegion(config, pg_collection.tp)
        self.activation, self.backend = activation, config.kernel_backend
        widths = {f"{prefix}gate_proj.weight": width, f"{prefix}up_proj.weight": width}
        self.linear_fc1 = input_projection(config, region, widths, gathered=False)
        self.linear_fc2 = output_projection(config, region, f"{prefix}down_proj.weight", width)

    def forward(self, x: Tensor) -> Tensor:
        """`[s(/tp) * b, h] -> [s(/tp) * b, h]`."""
        gate_up = self.linear_fc1(x)[0]
        backend = gated_backend(gate_up, self.activation, self.backend)
        return self.linear_fc2(
            gate_up,
            function=self._gated,
            keeps_inputs_only=backend != "torch",
            again=self._again if backend == "triton" else None,
        )[0]

    def _gated(self, gate_up: Tensor) -> Tensor:
        return gated_activation(gate_up, self.activation, backend=self.backend)

    def _again(self, d_inner: Tensor, gate_up: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        d_gate_up = gated_activation_again(d_inner, gate_up, self.activation)
        return d_inner, (d_gate_up,)
