"""The smaller and the larger of two numbers on Triton, as PyTorch has them: NaN stays NaN.

On a GPU `tl.minimum` and `tl.maximum` return the other number where one is NaN, so that a broken
gate would look sound. Triton's interpreter returns NaN; the tests make it do as a GPU does.
"""

import triton
import triton.language as tl


@triton.jit
def smaller(a, b):
    """The smaller of two numbers; NaN if one is NaN."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger(a, b):
    """The larger of two numbers; NaN if one is NaN. Combines reductions and scans as well."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
