"""Do graphs of the sLSTM's steps give what single launches give? A comparison bit by bit."""

from contextlib import nullcontext

import torch
from torch import Tensor

from xlstm_kernels.common.launch_graph import without_graphs
from xlstm_kernels.slstm.scan import slstm_scan
from xlstm_kernels.slstm.triton.graphs import SEGMENT

NAMES = ("hidden states", "gradient of gates", "gradient of recurrent weight", "gradient of bias")


def check_graphs(
    like: Tensor, head_dim: int, heads: int, forget_gate: str, rows: int = 1
) -> list[str]:
    """One sentence for each tensor whose bits differ; none where no graph can be captured.

    Args:
        like: Has the device and dtype of the pre-activations.
        head_dim: Width of a head.
        heads: Number of heads.
        forget_gate: As for `slstm_scan`.
        rows: Of the batch.
    """
    generator = torch.Generator().manual_seed(0)
    length = 2 * SEGMENT + SEGMENT // 2  # two replays and a rest that is launched
    given = [
        torch.randn(rows, length, 4, heads, head_dim, generator=generator),
        torch.randn(4, heads, head_dim, head_dim, generator=generator) / head_dim**0.5,
        torch.randn(4, heads, head_dim, generator=generator),
    ]
    given = [x.to(like.device, like.dtype).requires_grad_() for x in given]
    starts = torch.zeros(rows, length, dtype=torch.bool, device=like.device)
    starts[:, [SEGMENT // 2, SEGMENT]] = True
    found = []
    for mode in (nullcontext, without_graphs):
        with mode():
            h = slstm_scan(*given, boundaries=starts, forget_gate=forget_gate, backend="triton")
            found.append([h, *torch.autograd.grad(h.double().square().sum(), given)])
    return [
        f"slstm_scan on {like.device} as graphs, {name}: not the bits of single launches"
        for name, replayed, launched in zip(NAMES, *found, strict=True)
        if not torch.equal(replayed, launched)
    ]
