"""Triton's interpreter for the tests of this folder.

Triton reads TRITON_INTERPRET when a kernel is decorated, so these tests run in a process of their
own: tests/kernels/test_triton_interpreter.py starts it, and by hand it is
`TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/test_aot.py`. In any other process
nothing is collected here.
"""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


def repair_bf16():
    """Make bf16 in the interpreter what it is on a GPU, as far as a kernel may use it.

    tl.dot would multiply the bits; the product of two bf16 numbers is exact in float32, as on a
    tensor core. The cast from float32 would truncate; a GPU rounds to nearest even. Arithmetic on
    bf16 tensors stays garbage: kernels convert to float32 first.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, d, *options):
        a, b = (cast(self, x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, d, *options)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        rounded = np.where(np.isnan(src.data), np.uint16(0x7FC0), rounded)
        return interpreter.TensorHandle(rounded.reshape(src.data.shape), tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def repair_extremes():
    """Make `tl.minimum` and `tl.maximum` what they are on a GPU: they drop NaN unless asked.

    Reductions such as `tl.max` drop it in the interpreter as well.
    """
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    Builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    Builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)


if INTERPRETED:
    repair_bf16()
    repair_extremes()
