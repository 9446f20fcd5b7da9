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


@triton.jit
def centre_kernel(x, out, SIZE: tl.constexpr):
    """out = x less its mean, all of it in the registers of one program."""
    i = tl.arange(0, SIZE)
    value = tl.load(x + i)
    tl.store(out + i, value - tl.sum(value, 0) / SIZE)


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


def centre_variant(name, size, **fields):
    x = torch.empty(size, device="meta")
    return make_variant(
        name,
        centre_kernel,
        dict(x=x, out=x, SIZE=size),
        num_warps=1,
        num_stages=1,
        grid=(1,),
        bytes=2 * 4 * size,
        flops=2 * size,
        **fields,
    )


def triton_variants(target):
    # A matrix product that spills takes two minutes to compile; this takes seconds.
    return [
        product_variant("pipelined", setting="toy"),
        product_variant("in one stage", num_stages=1),
        centre_variant("spilling", 65536, setting="toy", phase="bw"),
        product_variant("in steps", tile=(16, 64, 16), num_warps=4, num_stages=1, steps=256),
    ]
