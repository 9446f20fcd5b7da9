"""What the graphs of the sLSTM's steps take of a GPU's memory, without a GPU."""

import torch

from xlstm_kernels.slstm.triton import graphs, scan


def graph_bytes(
    batch: int,
    steps: int,
    heads: int,
    d: int,
    dtype: torch.dtype,
    *,
    boundaries: bool,
    backward: bool,
    target: str = "sm_90",
) -> int:
    """Bytes of the buffers of one pass's graph; 0 where the pass has no graph.

    They stay from the first call of a shape on, for all layers and all lengths.

    Args:
        batch: Rows of the call.
        steps: Tokens of a row.
        heads: Its heads.
        d: Width of a head.
        dtype: Of the pre-activations.
        boundaries: Whether documents start inside the rows.
        backward: Which pass.
        target: The GPU as compilers call it.
    """
    preacts = torch.empty(batch, steps, 4, heads, d, dtype=dtype, device="meta")
    weight, bias = preacts.new_empty(4, heads, d, d), preacts.new_empty(4, heads, d)
    starts = preacts.new_empty(batch, steps, dtype=torch.uint8) if boundaries else None
    h, *states = (preacts.new_empty(batch, heads, d, dtype=torch.float32) for _ in range(4))
    out = preacts.new_empty(batch, steps, heads, d)
    kept = dict(zip(scan.KEPT, scan.kept_buffers(preacts), strict=True))
    if backward:
        roles, d_states = scan.BACKWARD, [h, *states[:2]]
        plan = scan.plan_backward(out, weight, starts, kept, d_states, h, preacts, target)
    else:
        roles, first = scan.FORWARD, (torch.stack([h, h]), *states)
        plan = scan.plan_forward(preacts, weight, bias, starts, first, out, kept, True, target)
    launch = next(plan)
    if launch.name != scan.STEP or steps < graphs.SEGMENT:
        return 0
    return sum(x.nbytes for x in graphs.buffers_for(launch, roles, graphs.SEGMENT).values())
