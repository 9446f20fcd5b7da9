"""The log of the forget gate, whatever its pre-activation."""

from torch import Tensor
from torch.nn.functional import logsigmoid

# Beyond it a gate is closed: exp(-1e6) is 0, and sums of such logs still have six digits behind the
# point in fp64. With -inf, or below -1e12, sums of logs would lose the open gates beside it.
CLOSED = -1e6


def log_forget_gate(preact: Tensor) -> Tensor:
    """`log sigmoid` of a pre-activation in fp64, at least `CLOSED`; nan stays nan."""
    return logsigmoid(preact.clamp(min=CLOSED).double())
