"""The verdict on a step: whether its update is applied, and what the host reads of the step.

A training step stays on the device. Loss, gradient norm and the decision are tensors there, and one
all-reduce makes every rank decide alike. The host waits for the device once, when it reads the
verdict: loss, norm, decision and the ranks' votes come in one tensor.

An optimizer that can be told on the device to change nothing gets the decision as a tensor, and the
host reads the verdict after everything is enqueued. Any other optimizer reads the verdict before
its update. Both ways read once, because `Verdict.read` keeps what it has read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """What the host knows of a step, the same on every rank.

    Attributes:
        loss: nats per unmasked token of the global batch.
        tokens: unmasked tokens of the global batch.
        grad_norm: 2-norm of the whole gradient before clipping.
        accepted: whether the update was applied; if not, weights and optimizer are as before.
        finite: whether loss and gradient were finite on every rank.
        votes: for each vote, whether any rank gave it.
        sources: for each source that is told apart, the sum of its unmasked tokens' losses and
            their number.
    """

    loss: float
    tokens: int
    grad_norm: float
    accepted: bool
    finite: bool = True
    votes: tuple[bool, ...] = ()
    sources: tuple[tuple[float, int], ...] = ()


class Verdict:
    """A step's loss, gradient norm and decision, on the device.

    Attributes:
        grad_norm: 2-norm of the whole gradient before clipping, a scalar.
        rejected: fp32 scalar, 1 where the update must not be applied and 0 otherwise. torch's fused
            optimizers take it as their `found_inf`.
    """

    def __init__(self, loss: Tensor, grad_norm: Tensor, flags: Tensor) -> None:
        self.grad_norm = grad_norm
        self.rejected = flags[0].float()
        self._packed = torch.cat((grad_norm.double().reshape(1), flags, loss))
        self._flags = len(flags)
        self._result: StepResult | None = None

    def read(self) -> StepResult:
        """Wait for the device and return what it found; the step's only such wait."""
        if self._result is None:
            norm, *values = self._packed.tolist()
            rejected, infinite, *votes = values[: self._flags]
            total, tokens, *sums = values[self._flags :]
            of_sources = zip(sums[: len(sums) // 2], sums[len(sums) // 2 :], strict=True)
            self._result = StepResult(
                loss=total / max(1.0, tokens),
                tokens=int(tokens),
                grad_norm=norm,
                accepted=not rejected,
                finite=not infinite,
                votes=tuple(map(bool, votes)),
                sources=tuple((total, int(tokens)) for total, tokens in of_sources),
            )
        return self._result


@dataclass(frozen=True)
class Guard:
    """The limits of one step. A step beyond them, or one that is not finite, changes nothing.

    Attributes:
        max_loss: largest mean loss in nats per token.
        max_grad_norm: largest gradient norm before clipping.
    """

    max_loss: float = math.inf
    max_grad_norm: float = math.inf

    def judge(self, loss: Tensor, grad_norm: Tensor, votes: Sequence[bool] = ()) -> Verdict:
        """Decide on a step without waiting for the device; called by all ranks.

        Args:
            loss: see `pretrain.engines.base.Engine.forward_backward`.
            grad_norm: 2-norm of the whole gradient before clipping, a scalar.
            votes: what this rank votes for; a vote counts if any rank gives it.
        """
        mean = loss[0] / loss[1].clamp(min=1.0)
        finite = mean.isfinite() & grad_norm.isfinite()
        accepted = finite & (mean <= self.max_loss) & (grad_norm <= self.max_grad_norm)
        # Filled on the device: a copy from the host's memory would wait for the queue of work.
        given = [torch.full_like(mean, float(vote)) for vote in votes]
        flags = torch.stack([(~accepted).to(mean.dtype), (~finite).to(mean.dtype), *given])
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        return Verdict(loss, grad_norm, flags)


FINITE = Guard()  # accepts every step whose loss and gradient are finite
