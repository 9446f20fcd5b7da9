"""The soft cap of logits and of gate pre-activations (xLSTM 7B, arXiv 2503.13427, section 3)."""

import torch
from torch import Tensor


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(x / cap)`; `None` leaves `x` as it is."""
    return x if cap is None else cap * torch.tanh(x / cap)
