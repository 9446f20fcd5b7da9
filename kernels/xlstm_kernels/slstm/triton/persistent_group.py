"""Whether a call of the sLSTM fits a GPU in its persistent form, and over how many programs.

The programs of `persistent` wait for each other, so all of them must run at the same time: there is
at most one for each processor. Each holds its columns of the recurrent weights in shared memory.
Nothing here needs Triton or a GPU: the checks of a run file ask here too.
"""

from typing import NamedTuple

from xlstm_kernels.common.device_limits import Device

ROWS = 16  # of a program: the least that a tensor core's product takes
WIDTHS = (32, 16)  # columns of a program: of the gates of 8 columns each warp has one product


class Group(NamedTuple):
    """How a call is shared out.

    Attributes:
        width: Columns of a program.
        tiles: Programs that share a head and a block of rows, and meet at every step.
        programs: Of all groups.
        num_warps: Of a program.
    """

    width: int
    tiles: int
    programs: int
    num_warps: int


def _group(batch: int, heads: int, d: int, width: int) -> tuple[Group, int]:
    """The group of programs of `width` columns, and the bytes of shared memory of a program."""
    tiles, blocks = -(-d // width), -(-batch // ROWS)
    whole = 1 << (d - 1).bit_length()
    return Group(width, tiles, heads * tiles * blocks, width // 2), whole * (8 * width + 4 * ROWS)


def plan_group(batch: int, heads: int, d: int, device: Device | None) -> Group | None:
    """The widest programs that fit; None if none do.

    R takes 8 heads d^2 bytes in bf16 for each block of ROWS rows, of which a program holds
    8 D width, with D the power of two that is not below d. With 4 ROWS D of what a step exchanges
    this is at most the shared memory of a program. There are heads ceil(d / width)
    ceil(batch / ROWS) programs.

    Args:
        batch: Rows of the call.
        heads: Its heads.
        d: Width of a head.
        device: What it has; None sets no limit.
    """
    for width in WIDTHS:
        group, shared = _group(batch, heads, d, width)
        if device is None or (shared <= device.shared and group.programs <= device.processors):
            return group
    return None


def misfit_reason(batch: int, heads: int, d: int, device: Device) -> str | None:
    """Why a call does not fit a device, as a clause with the numbers; None if it fits."""
    if plan_group(batch, heads, d, device) is not None:
        return None
    group, shared = _group(batch, heads, d, WIDTHS[-1])
    if shared > device.shared:
        return (
            f"{group.width} columns of a head of {d} take {shared:,} bytes of shared memory, and "
            f"the GPU gives a program {device.shared:,}"
        )
    return (
        f"{batch} rows of {heads} heads of {d} are {group.programs} programs that must run at the "
        f"same time, and the GPU has {device.processors} processors"
    )
