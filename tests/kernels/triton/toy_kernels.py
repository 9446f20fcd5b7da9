"""Small kernels with known properties, for the tests of the compiler report and of the checker."""

import torch
import triton
import triton.language as tl

from benchmarks.kernel_variants.variant import make_variant


@triton.jit
def product_kernel(
    a, b, out, rows, inner, columns, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    """out = a @ b, one M x N tile for each program; the tiles divide the shapes."""
    i = tl.program_id(0) * M + tl.arange(0, M)
    j = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, inner, K):
        k = start + tl.arange(0, K)
        left = tl.load(a + i[:, None] * inner + k[None, :])
        right = tl.load(b + k[:, None] * columns + j[None, :])
        total += tl.dot(left, right)
    tl.store(out + i[:, None] * columns + j[None, :], total.to(out.dtype.element_ty))


def product_variant(name, size=4096, tile=(128, 128, 64), num_warps=8, num_stages=3, **fields):
    a = torch.empty(size, size, dtype=torch.bfloat16, device="meta")
    M, N, K = tile
    arguments = dict(a=a, b=a, out=a, rows=size, inner=size, columns=size, M=M, N=N, K=K)
    return make_variant(
        name,
        product_kernel,
        arguments,
        num_warps=num_warps,
        num_stages=num_stages,
        grid=(size // M, size // N),
        bytes=3 * 2 * size**2,
        flops=2 * size**3,
        **fields,
    )


def triton_variants(target):
    return [
        product_variant("pipelined", setting="toy"),
        product_variant("in one stage", num_stages=1),
        product_variant("spilling", tile=(256, 256, 32), num_warps=2, setting="toy", phase="bw"),
        product_variant("in steps", tile=(16, 64, 16), num_warps=4, num_stages=1, steps=256),
    ]
