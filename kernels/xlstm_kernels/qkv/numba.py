"""q, k, v and gates of the classic mLSTM on the CPU: one pass over memory forward, one backward."""

import torch
from torch import Tensor

from xlstm_kernels.common.numba import tasks
from xlstm_kernels.common.numba.tasks import readable, run_tasks

PARTS = 16  # of the tokens, with a sum of the weights' gradients each
WIDTH = 4  # of a block
TOKENS = 4  # that the loops take at once


def unsupported_reason(
    like: Tensor, *, asked: bool, block: int, steps: int, head_dim: int, elements: int
) -> str | None:
    """Why this backend cannot run such a call, with the remedy; None if it can."""
    if block != WIDTH:
        return f"the compiled loops have blocks of width {WIDTH}, not {block}; use 'torch'"
    if steps % TOKENS:
        return f"{steps} tokens are not a multiple of {TOKENS}; use 'torch'"
    return tasks.unsupported_reason(like, asked=asked, width=head_dim, elements=elements)


@torch.library.custom_op("xlstm_kernels::qkv_and_gates_numba", mutates_args=())
def qkv_and_gates_numba(
    convolved: Tensor, x: Tensor, qkv_weight: Tensor, gate_weight: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numba backend of `xlstm_kernels.qkv_and_gates` (checked arguments, same meaning)."""
    from xlstm_kernels.qkv import numba_loops

    q, k, v, gates = _results(x, gate_weight, heads)
    sources = readable(convolved), readable(x)
    run_tasks(
        numba_loops.forward, x.shape[0] * x.shape[1] // TOKENS, *_sizes(q, gates),
        *(source.stride()[:2] for source in sources), *sources,
        _diagonals(qkv_weight), gate_weight.float().contiguous(), q, k, v, gates,
    )  # fmt: skip
    return q, k, v, gates


@qkv_and_gates_numba.register_fake
def _(convolved, x, qkv_weight, gate_weight, heads):
    return _results(x, gate_weight, heads)


@torch.library.custom_op("xlstm_kernels::qkv_and_gates_numba_backward", mutates_args=())
def _backward(
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_gates: Tensor,
    convolved: Tensor,
    x: Tensor,
    qkv_weight: Tensor,
    gate_weight: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of both inputs and both weights."""
    from xlstm_kernels.qkv import numba_loops

    inner = x.shape[2]
    d_diagonals = x.new_empty(PARTS, 3, WIDTH, inner)
    d_gate_weight = x.new_empty(PARTS, *gate_weight.shape)
    sources = readable(convolved), readable(x)
    gradients = [torch.empty_like(one) for one in sources]
    run_tasks(
        numba_loops.backward, PARTS, PARTS, len(x), *_sizes(q, d_gates),
        *(one.stride()[:2] for one in (*sources, *gradients)),
        *(one.contiguous() for one in (d_q, d_k, d_v, d_gates)), *sources,
        _diagonals(qkv_weight.mT), gate_weight.float().contiguous(), q, k, v,
        *gradients, d_diagonals, d_gate_weight,
    )  # fmt: skip
    return *gradients, _blocks(d_diagonals.sum(0)), d_gate_weight.sum(0)


@_backward.register_fake
def _(d_q, d_k, d_v, d_gates, convolved, x, qkv_weight, gate_weight, q, k, v):
    d_weights = x.new_empty(qkv_weight.shape), x.new_empty(gate_weight.shape)
    return *(torch.empty_like(readable(one)) for one in (convolved, x)), *d_weights


def _save(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, *output[:3])


def _differentiate(ctx, *d_outputs):
    return *_backward(*d_outputs, *ctx.saved_tensors), None


qkv_and_gates_numba.register_autograd(_differentiate, setup_context=_save)


def _results(x: Tensor, gate_weight: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Memory for q, k, v [b, heads, s, d] and the gates [b, s, gates]."""
    b, s, inner = x.shape
    qkv = (x.new_empty(b, heads, s, inner // heads) for _ in range(3))
    return *qkv, x.new_empty(b, s, len(gate_weight))


def _sizes(q: Tensor, gates: Tensor) -> tuple[int, int, int, int]:
    """Steps, heads, width of a head, and number of gates."""
    return q.shape[2], q.shape[1], q.shape[3], gates.shape[2]


def _turned() -> tuple[Tensor, Tensor]:
    """Rows and columns [turn, row] of a block, by how far the column lies after the row."""
    row = torch.arange(WIDTH).expand(WIDTH, WIDTH)
    return row, (row + row.t()) % WIDTH


def _diagonals(weight: Tensor) -> Tensor:
    """Blocks [3 * blocks, out, in] as [3, turn, inner]: what multiplies inputs turned so far."""
    row, column = _turned()
    turned = weight.float().unflatten(0, (3, -1))[..., row, column]  # [3, blocks, turn, out]
    return turned.transpose(1, 2).reshape(3, WIDTH, -1).contiguous()


def _blocks(diagonals: Tensor) -> Tensor:
    """Inverse of `_diagonals`."""
    row, column = _turned()
    turned = diagonals.view(3, WIDTH, -1, WIDTH).transpose(1, 2)
    blocks = torch.empty_like(turned, memory_format=torch.contiguous_format)
    blocks[..., row, column] = turned
    return blocks.view(-1, WIDTH, WIDTH)
