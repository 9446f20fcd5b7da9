"""The search for operands that are overwritten too early, on listings with and without one."""

import pytest

from benchmarks.compiled.assembly import Listing
from benchmarks.compiled.wgmma import overwritten_operands, register_operands
from tests.kernels.benchmarks.test_latency import listing

PRODUCT = "HGMMA.64x64x16.F32.BF16 R64, R104, gdesc[UR16].tnspB, R64"
LAST = f"{PRODUCT}, gsb0"
WAIT, WAIT_FOR_OLDER = (f"WARPGROUP.DEPBAR.LE gsb0, {most}" for most in ("0x0", "0x1"))
SHARED = "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR28], R24, gsb0"  # both operands in shared memory
WRITE = "FMUL R107, R8, R9"  # the last of the four registers from 104


def found(code: Listing) -> list[tuple[int, int, int]]:
    return [(one.product, one.writer, one.register) for one in overwritten_operands(code)]


def test_a_write_before_the_wait_is_found_and_one_after_it_is_not():
    assert found(listing(LAST, WRITE, WAIT, "EXIT")) == [(0, 1, 107)]
    assert found(listing(LAST, WAIT, WRITE, "EXIT")) == []
    assert found(listing(PRODUCT, WRITE, LAST, WAIT, "EXIT")) == [(0, 1, 107)]
    assert found(listing(WRITE, LAST, WAIT, "EXIT")) == []


def test_a_wait_covers_the_groups_that_it_does_not_leave_running():
    assert found(listing(LAST, SHARED, WAIT_FOR_OLDER, WRITE, "EXIT")) == []
    assert found(listing(SHARED, LAST, WAIT_FOR_OLDER, WRITE, "EXIT")) == [(1, 3, 107)]
    # A product whose group is open is covered by no wait.
    assert found(listing(PRODUCT, WAIT, WRITE, "EXIT")) == [(0, 2, 107)]
    # A wait that may be left out is none.
    assert found(listing(LAST, f"@P0 {WAIT}", WRITE, "EXIT")) == [(0, 2, 107)]


def test_every_path_is_followed():
    around = listing("0:", WRITE, LAST, "@P0 BRA `(.L_x_0)", WAIT, "EXIT")
    assert found(around) == [(1, 0, 107)]
    aside = listing(LAST, "@P0 BRA `(.L_x_0)", WAIT, "0:", WRITE, "EXIT")
    assert found(aside) == [(0, 3, 107)]
    waited = listing("0:", WRITE, LAST, WAIT, "@P0 BRA `(.L_x_0)", "EXIT")
    assert found(waited) == []


@pytest.mark.parametrize(
    ("instruction", "writes"),
    [
        ("LDS.128 R100, [R2]", False),
        ("LDS.128 R101, [R2]", True),
        ("LDG.E.64 R103, desc[UR4][R10.64]", True),
        ("LDSM.16.M88.4 R101, [R20+UR5]", True),
        ("IMAD.WIDE R102, R2, R3, R4", False),
        ("IMAD.WIDE R103, R2, R3, R4", True),
        ("CS2R R106, SRZ", True),
        ("SHF.L.U64.HI R103, R81, 0x2, R106", False),
        ("SHFL.BFLY PT, R105, R3, 0x1, 0x1f", True),
        ("LOP3.LUT P0, R105, R3, 0x1, RZ, 0xc0, !PT", True),
        ("@!P1 MOV R106, R3", True),
        ("ISETP.GE.AND P0, PT, R105, R106, PT", False),
        ("STS [R105], R106", False),
        ("STG.E desc[UR4][R104.64], R106", False),
        ("R2UR UR16, R105", False),
        ("BAR.SYNC.DEFER_BLOCKING R105, 0x80", False),
        ("FADD R3, R104, R105", False),
        ("MOV R108, R3", False),
    ],
)
def test_what_an_instruction_writes(instruction, writes):
    assert bool(found(listing(LAST, instruction, WAIT, "EXIT"))) == writes


def test_operands_in_registers_are_told_from_those_in_shared_memory():
    code = listing(SHARED, PRODUCT, LAST, WAIT, "EXIT")
    assert register_operands(code) == {1: 104, 2: 104}
    # Without waits every write after a product counts.
    late = listing(LAST, WAIT, WRITE, "EXIT")
    assert len(overwritten_operands(late, waits=False)) == 1
    text = overwritten_operands(late, waits=False)[0].describe(late)
    assert "FMUL R107, R8, R9" in text and "writes R107" in text
