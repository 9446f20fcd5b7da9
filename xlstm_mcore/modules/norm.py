"""The norm of a block: RMSNorm or LayerNorm, with sequence parallelism."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_kernels import multihead_norm
from xlstm_kernels.norm.norm import norm_backend
from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.parameters.slices import ParameterSlice, new_parameter
from xlstm_mcore.recompute import recompute_in_backward


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, without bias, computed in fp32.

    On a GPU it is one kernel, which reads and writes the model's type and keeps its input alone:
    the norm of one head as wide as the model. megatron-core's plain norm refuses sequence
    parallelism, and its others need Apex or TransformerEngine.

    Args:
        config: `norm` ("rmsnorm" or "layernorm"), `norm_eps` and `hidden_size` are read.
        name: Global name of the weight, which is initialised to ones.
    """

    def __init__(self, config: XLSTMConfig, name: str) -> None:
        super().__init__()
        self.kind, self.eps, self.backend = config.norm, config.norm_eps, config.kernel_backend
        shape = (config.hidden_size,)
        self.weight = new_parameter(config, [ParameterSlice(name, shape, (0,), (0,), shape)])

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x [..., hidden]`; same shape and dtype."""
        kernel = self._has_kernel(x)
        return recompute_in_backward(self._normalize, x, self.weight, keeps_inputs_only=kernel)

    def _normalize(self, x: Tensor, weight: Tensor) -> Tensor:
        if self._has_kernel(x):
            return multihead_norm(x, weight, self.kind, self.eps, layout="row")
        dtype = torch.promote_types(x.dtype, torch.float32)
        shape, weight = weight.shape, weight.to(dtype)
        if self.kind == "layernorm":
            out = F.layer_norm(x.to(dtype), shape, weight, None, self.eps)
        else:
            out = _RMSNorm.apply(x.to(dtype), weight, self.eps)
        return out.to(x.dtype)

    def _has_kernel(self, x: Tensor) -> bool:
        """Whether there is a kernel for this device and width."""
        if self.backend == "torch":
            return False
        return norm_backend(x, None) != "torch"


class _RMSNorm(torch.autograd.Function):
    """RMSNorm in half the passes over memory of torch's, which is made of single steps on a CPU."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return torch.mul(x, inverse).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_y):
        x, weight, inverse = ctx.saved_tensors
        products = (d_y * x).reshape(-1, x.shape[-1])
        along = (products @ weight).view(inverse.shape)
        d_weight = inverse.flatten() @ products
        d_x = torch.mul(d_y, weight).mul_(inverse)
        d_x.addcmul_(x, along.mul_(inverse.pow(3)), value=-1 / x.shape[-1])
        return d_x, d_weight, None
