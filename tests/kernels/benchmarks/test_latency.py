"""The count of a recurrence's dependencies, on code whose answer is known."""

import pytest

from benchmarks.compiled.assembly import Listing
from benchmarks.compiled.latency import (
    ARITHMETIC,
    BARRIER,
    L2,
    PRODUCT,
    SPECIAL,
    operands_of,
    step_floor,
    step_walk,
)


def listing(*lines):
    """A listing of instructions; "name:" lines are labels."""
    text, address = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(f".L_x_{line}")
        else:
            text.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return Listing("\n".join(text), "sass")


PRODUCT_LINE = "HMMA.16816.F32.BF16 R4, R8, R12, R4"


def test_products_into_one_accumulator_wait_for_one_another():
    code = listing("0:", PRODUCT_LINE, PRODUCT_LINE, "@P0 BRA `(.L_x_0)", "EXIT")
    found = step_walk(code, (), 1)
    assert found.cycles == 2 * PRODUCT and found.met["products"] == 2
    assert found.cycles == found.instructions + found.waited["products"]
    apart = listing(
        "0:", PRODUCT_LINE, "HMMA.16816.F32.BF16 R20, R8, R12, R20", "@P0 BRA `(.L_x_0)", "EXIT"
    )
    assert step_walk(apart, (), 1).cycles == PRODUCT  # side by side


def test_what_is_loaded_exchanged_and_special_lies_on_the_way():
    code = listing(
        "0:",
        "LDG.E.64 R2, desc[UR4][R10.64]",
        PRODUCT_LINE,
        "FADD R6, R5, R3",  # the second registers of both results
        "MUFU.EX2 R7, R6",
        "STS [R1], R7",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "LDS R8, [R1]",
        "@P0 BRA `(.L_x_0)",
        "EXIT",
    )
    found = step_walk(code, (), 1)
    assert found.waited["barriers"] == BARRIER
    assert found.waited["special"] == SPECIAL - 1
    assert L2 - 25 < found.waited["global"] < L2
    assert found.cycles == found.instructions + sum(found.waited.values())


def test_asynchronous_copies_are_waited_for_where_the_code_waits():
    def waiting(left):
        code = listing(
            "0:", "LDGSTS.E.BYPASS.128 [R1], [R2.64]", "LDGDEPBAR", f"DEPBAR.LE SB0, {left}",
            PRODUCT_LINE, "@P0 BRA `(.L_x_0)", "EXIT",
        )  # fmt: skip
        return step_walk(code, (), 1).waited["global"]

    assert waiting("0x0") > waiting("0x1") > 0  # the copy of this turn, or of the one before


NESTED = (
    "0:", "MUFU.EX2 R7, R7",
    "1:", "IADD3 R1, R1, 0x1, RZ", "@!P2 BRA `(.L_x_3)",
    "2:", PRODUCT_LINE, "@P1 BRA `(.L_x_2)",
    "3:", "@P3 BRA `(.L_x_1)", "@P0 BRA `(.L_x_0)", "EXIT",
)  # fmt: skip


def test_loops_inside_a_step_turn_as_often_as_the_source_says():
    code = listing(*NESTED)
    assert [code.count(body).tensor for body in code.working_nest()] == [1, 1, 1]
    found = step_walk(code, (3, 5), 1)
    assert found.met["products"] == 15 and found.met["special"] == 1
    assert found.cycles >= 15 * PRODUCT
    assert step_walk(code, (3, 6), 2).met["products"] == 9  # two turns of the source made one


def test_a_step_that_is_a_launch_begins_where_the_kernel_does():
    code = listing(
        "MOV R1, R9", "@P1 BRA `(.L_x_1)", *["FADD R20, R21, R22"] * 9,
        "1:", "IADD3 R2, R1, 0x1, RZ",
        "0:", PRODUCT_LINE, "@P0 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip
    turn, launch = step_walk(code, (), 1), step_walk(code, (), 1, launched=True)
    assert launch.instructions == turn.instructions + 3  # the shorter way
    assert launch.cycles == turn.cycles + 1 + ARITHMETIC


def test_a_loop_of_one_turn_may_be_gone_but_no_other():
    code = listing("0:", "MUFU.EX2 R7, R7", "1:", PRODUCT_LINE, "@P1 BRA `(.L_x_1)",
                   "@P0 BRA `(.L_x_0)", "EXIT")  # fmt: skip
    assert step_walk(code, (1, 4), 1).met["products"] == 4
    with pytest.raises(ValueError, match="2 loops were found"):
        step_walk(code, (2, 4), 1)


def test_the_floor_is_the_largest_of_what_limits_a_step():
    code = listing("0:", PRODUCT_LINE, *["FADD R20, R21, R22"] * 30, "@P0 BRA `(.L_x_0)", "EXIT")
    floor = step_floor(step_walk(code, (), 1), 8, 64 * 1000)
    assert floor == {"dependencies": 32, "issue": 64, "L2": 1000}


def test_operands():
    def of(line):
        return operands_of(listing(line).instructions[0])

    assert of("IMAD.WIDE R2, R3, 0x4, R6") == (["R2", "R3"], ["R3", "R6", "R7"])
    assert of("ISETP.GE.AND P0, PT, R1, R2, P1") == (["P0"], ["R1", "R2", "P1"])
    assert of("STG.E.128 desc[UR4][R8.64], R12")[0] == []
    assert of("LDSM.16.MT88.4 R4, [R1]")[0] == ["R4", "R5", "R6", "R7"]
    assert of("@!P3 IADD3 R4, P5, R1, R2, RZ") == (["R4", "P5"], ["R1", "R2", "P3"])
