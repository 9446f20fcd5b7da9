"""The norm of a block: RMSNorm or LayerNorm, with sequence parallelism."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_kernels import add_norm, multihead_norm, norm_beside
from xlstm_kernels.norm.norm import norm_backend
from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.parameters.slices import ParameterSlice, new_parameter
from xlstm_mcore.recompute import known_output, recompute_in_backward


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

    def forward(self, x: Tensor, added: Tensor | None = None, *, beside: bool = False) -> Any:
        """Normalise `x [..., hidden]`; same shape and dtype.

        Args:
            x: The input.
            added: A tensor of its shape; the result is `x + added` and the norm of it, by one
                kernel on a GPU.
            beside: Whether `x` goes on; the result is `x` and the norm of it, whose gradients one
                kernel adds up on a GPU.
        """
        kernel = self._kernel(x)
        if kernel == "triton" and (beside or added is not None):
            options = self.weight, self.kind, self.eps
            total, y = norm_beside(x, *options) if added is None else add_norm(x, added, *options)
            return total, known_output(y, self._normalize, total, self.weight)
        total = x if added is None else x + added
        y = recompute_in_backward(
            self._normalize, total, self.weight, keeps_inputs_only=kernel != "torch"
        )
        return (total, y) if beside or added is not None else y

    def _normalize(self, x: Tensor, weight: Tensor) -> Tensor:
        if self._kernel(x) != "torch":
            return multihead_norm(x, weight, self.kind, self.eps, layout="row")
        dtype = torch.promote_types(x.dtype, torch.float32)
        shape, weight = weight.shape, weight.to(dtype)
        if self.kind == "layernorm":
            out = F.layer_norm(x.to(dtype), shape, weight, None, self.eps)
        else:
            out = _RMSNorm.apply(x.to(dtype), weight, self.eps)
        return out.to(x.dtype)

    def _kernel(self, x: Tensor) -> str:
        """The backend for this device and width."""
        return "torch" if self.backend == "torch" else norm_backend(x, None)


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
