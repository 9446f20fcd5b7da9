"""What the kernels around the cells compute, from its definition, for `self_check_layers`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def silu_of_conv(
    x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor, *before: Tensor
) -> Tensor:
    """SiLU of the causal convolution of x [s, c], from its definition."""
    width = weight.shape[1]
    first = width - 1
    padded = torch.cat((*(before or [x.new_zeros(first, x.shape[1])]), x))
    document = F.pad(starts[0].cumsum(0), (first, 0))
    rows = []
    for t in range(first, len(padded)):
        taps = [j for j in range(width) if document[t - j] == document[t]]
        rows.append(sum((weight[:, first - j] * padded[t - j] for j in taps), bias))
    return F.silu(torch.stack(rows))


def normalised(x: Tensor, kind: str, eps: float) -> Tensor:
    """x with unit variance, or mean square, in its last dimension."""
    centered = x - x.mean(-1, keepdim=True) if kind == "layernorm" else x
    return centered * (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
