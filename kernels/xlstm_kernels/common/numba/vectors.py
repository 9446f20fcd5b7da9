"""Vectors of float32 numbers for loops that Numba compiles, and functions of them.

Vector types are written out (`Vec`), since LLVM would have to prove that a dozen arrays do not
overlap before it vectorised the pointwise part of a loop.
"""

import operator

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

# A tile of 4 x TILE sums fits the registers: 8 of 32 with AVX-512, 8 of 16 with 8 lanes.
LANES = 16 if llvm.get_host_cpu_features().get("avx512f") else 8
TILE = 2 * LANES

LOG2_E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440054690583e-4
ROUND = 12582912.0  # 1.5 * 2^23: adding it leaves the rounded integer in the lowest bits


class VecType(types.Type):
    """LANES float32 numbers."""

    def __init__(self):
        super().__init__("Vec")


Vec = VecType()
SCALAR = ir.FloatType()
LLVM_VEC, LLVM_INTS = ir.VectorType(SCALAR, LANES), ir.VectorType(ir.IntType(32), LANES)
# Fused multiply-adds, nothing that changes the order of sums or assumes finite numbers.
FLAGS = ("contract",)


@register_model(VecType)
class VecModel(models.PrimitiveModel):
    """A Vec is one LLVM vector, which fits the registers of any CPU in as many as it takes."""

    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, LLVM_VEC)


def _splat(builder, x):
    first = builder.insert_element(ir.Constant(LLVM_VEC, ir.Undefined), x, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(LLVM_VEC, ir.Undefined), zeros)


def _number(builder, x, kind):
    """Any number or Vec as an LLVM vector."""
    if kind == Vec:
        return x
    if isinstance(kind, types.Integer):
        return _splat(builder, builder.sitofp(x, SCALAR))
    return _splat(builder, x if kind == types.float32 else builder.fptrunc(x, SCALAR))


def _define(function, instruction):
    """`function`, an operator, for a Vec and a Vec or number."""

    class Typing(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and Vec in args:
                if all(x == Vec or isinstance(x, types.Number) for x in args):
                    return Vec(*args)

    infer_global(function)(Typing)
    for left, right in ((Vec, Vec), (Vec, types.Number), (types.Number, Vec)):

        @lower_builtin(function, left, right)
        def lower(context, builder, sig, args):
            a, b = (_number(builder, x, kind) for x, kind in zip(args, sig.args, strict=True))
            return getattr(builder, instruction)(a, b, flags=FLAGS)


for _function, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define(_function, _instruction)


def _address(context, builder, kind, array, index):
    data = cgutils.create_struct_proxy(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), LLVM_VEC.as_pointer())


@intrinsic
def load(typing, array, index):
    """The Vec at array[index : index + LANES]."""

    def generate(context, builder, sig, args):
        return builder.load(_address(context, builder, sig.args[0], *args), align=4)

    return Vec(array, types.intp), generate


@intrinsic
def store(typing, array, index, x):
    """array[index : index + LANES] = x."""

    def generate(context, builder, sig, args):
        address = _address(context, builder, sig.args[0], *args[:2])
        builder.store(_number(builder, args[2], sig.args[2]), address, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, x), generate


@intrinsic
def where_less(typing, a, b, yes, no):
    """Lane by lane: a < b ? yes : no."""

    def generate(context, builder, sig, args):
        a, b, yes, no = (_number(builder, x, k) for x, k in zip(args, sig.args, strict=True))
        return builder.select(builder.fcmp_ordered("<", a, b), yes, no)

    return Vec(a, b, yes, no), generate


@intrinsic
def times_power_of_two(typing, x, shifted):
    """`x` * 2^n with n in the lowest bits of `shifted`, by adding to the exponent."""

    def generate(context, builder, sig, args):
        x, shifted = (builder.bitcast(_number(builder, a, k), LLVM_INTS)
                      for a, k in zip(args, sig.args, strict=True))  # fmt: skip
        power = builder.shl(shifted, ir.Constant(LLVM_INTS, [23] * LANES))
        return builder.bitcast(builder.add(x, power), LLVM_VEC)

    return Vec(x, shifted), generate


@intrinsic
def splat(typing, x):
    """A Vec of one number."""

    def generate(context, builder, sig, args):
        return _number(builder, args[0], sig.args[0])

    return Vec(x), generate


@intrinsic
def turn(typing, x):
    """Each four lanes turned by one: the second comes first, the first last."""

    def generate(context, builder, sig, args):
        lanes = [lane // 4 * 4 + (lane + 1) % 4 for lane in range(LANES)]
        mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), lanes)
        return builder.shuffle_vector(args[0], ir.Constant(LLVM_VEC, ir.Undefined), mask)

    return Vec(x), generate


def _folded(builder, x, join):
    """One number of all lanes: the upper half joined with the lower, until one is left."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        halves = []
        for first in (0, lanes):
            kept = ir.Constant(
                ir.VectorType(ir.IntType(32), lanes), list(range(first, first + lanes))
            )
            halves.append(builder.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), kept))
        x = join(*halves)
    return builder.extract_element(x, ir.IntType(32)(0))


@intrinsic
def lane_sum(typing, x):
    """The sum of all lanes."""

    def generate(context, builder, sig, args):
        return _folded(builder, args[0], builder.fadd)

    return types.float32(x), generate


@intrinsic
def lane_max(typing, x):
    """The largest lane."""

    def generate(context, builder, sig, args):
        def larger(a, b):
            return builder.select(builder.fcmp_ordered("<", a, b), b, a)

        return _folded(builder, args[0], larger)

    return types.float32(x), generate


def inlined(function):
    """A helper, inlined by LLVM."""
    return njit(forceinline=True, error_model="numpy", boundscheck=False)(function)


@inlined
def magnitude(x):
    """|x|."""
    return where_less(x, 0.0, 0.0 - x, x)


@inlined
def split_exponent(x):
    """(exp(r) - 1, n in the lowest bits) with x = r + n ln 2, |r| <= ln 2 / 2, |x| < 88."""
    shifted = x * LOG2_E + ROUND
    n = shifted - ROUND
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    # The power series to r^7 / 7!: the next term is below 6e-9.
    p = r * (1 / 5040) + 1 / 720
    p = p * r + 1 / 120
    p = p * r + 1 / 24
    p = p * r + 1 / 6
    p = p * r + 0.5
    return p * (r * r) + r, shifted


@inlined
def exp(x):
    """The exponential of x < 88, -inf included; 0 below -86. NaN stays."""
    less_one, shifted = split_exponent(where_less(x, -86.0, -86.0, x))
    power = times_power_of_two(1.0, shifted)  # of a NaN's bits it could make a number
    return where_less(x, -86.0, 0.0, power * (less_one + 1.0))


@inlined
def log1p_unit(x):
    """log(1 + x) for x in [0, 1]: 2 atanh(x / (2 + x)), whose series ends below 3e-9."""
    y = x / (x + 2.0)
    y2 = y * y
    p = y2 * (2 / 15) + 2 / 13
    p = p * y2 + 2 / 11
    p = p * y2 + 2 / 9
    p = p * y2 + 2 / 7
    p = p * y2 + 2 / 5
    p = p * y2 + 2 / 3
    return p * (y2 * y) + y * 2.0


@inlined
def tanh(x):
    """Tanh to float32 precision at every size, from exp(2|x|) - 1."""
    size = magnitude(x) * 2.0
    less_one, shifted = split_exponent(where_less(20.0, size, 20.0, size))  # NaN stays
    power = times_power_of_two(1.0, shifted)
    expm1 = power * less_one + (power - 1.0)
    y = expm1 / (expm1 + 2.0)
    return where_less(x, 0.0, 0.0 - y, y)


@inlined
def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow."""
    e = exp(0.0 - magnitude(x))
    y = 1.0 / (e + 1.0)
    return where_less(x, 0.0, e * y, y)
