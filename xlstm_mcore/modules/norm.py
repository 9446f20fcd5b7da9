"""The norm of a block: RMSNorm or LayerNorm, with sequence parallelism."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.parameters.slices import ParameterSlice, new_parameter
from xlstm_mcore.recompute import recompute_in_backward


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, without bias, computed in fp32.

    megatron-core's plain norm refuses sequence parallelism, and its others need Apex or
    TransformerEngine.

    Args:
        config: `norm` ("rmsnorm" or "layernorm"), `norm_eps` and `hidden_size` are read.
        name: Global name of the weight, which is initialised to ones.
    """

    def __init__(self, config: XLSTMConfig, name: str) -> None:
        super().__init__()
        self.kind, self.eps = config.norm, config.norm_eps
        shape = (config.hidden_size,)
        self.weight = new_parameter(config, [ParameterSlice(name, shape, (0,), (0,), shape)])

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x [..., hidden]`; same shape and dtype."""
        return recompute_in_backward(self._normalize, x, self.weight)

    def _normalize(self, x: Tensor, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        shape, weight = weight.shape, weight.to(dtype)
        if self.kind == "layernorm":
            out = F.layer_norm(x.to(dtype), shape, weight, None, self.eps)
        else:
            out = F.rms_norm(x.to(dtype), shape, weight, self.eps)
        return out.to(x.dtype)
