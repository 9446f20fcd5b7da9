"""What the sLSTM blocks of a model cost by the form of their time loop: bounds, not times.

    python -m benchmarks.slstm_forms
    python -m benchmarks.slstm_forms --rows 1 4

A step of xLSTM[7:1] beside one of xLSTM[1:0] of the same size: the blocks are counted as
`benchmarks.block_roofline` does, and the time loop by the machine code of its kernels
(`benchmarks.kernel_resources`), compiled for an H100. Constants that no code shows are assumptions,
and printed as such. Communication, the optimizer and the host (but for launches) are left out.
"""

import argparse
from collections import Counter
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from benchmarks.block_roofline import Pass, block_of
from benchmarks.compiled.aot import DEVICES, Resources, examine
from benchmarks.counting.device_limits import BANDWIDTH, BF16_PRODUCTS
from benchmarks.kernel_resources import GRAPH_LAUNCH_US, MEETING_US
from benchmarks.kernel_variants import persistent
from benchmarks.kernel_variants.slstm import describe, plan_both
from pretrain.config import load_config
from xlstm_kernels.slstm.triton import graphs, scan
from xlstm_kernels.slstm.triton.persistent_group import plan_group
from xlstm_mcore.pattern import parse_pattern

TARGET = "sm_90"
LAUNCH_US = 40.0  # of the host, for a launch from Python: the lower end of 40 to 80
REPLAY_US = 10.0  # between two replays of a graph
# The ratio of [7:1] to [1:0], by form and rows.
GOALS = {("graphs", 4): 1.35, ("persistent", 4): 1.25, ("persistent", 16): 1.05}


@dataclass(frozen=True)
class Loop:
    """The time loop of one sLSTM block, one micro-batch, both passes together.

    Attributes:
        launches: Single steps.
        floor_us: Least time of all of them on the GPU, without what starts them.
        copied: Bytes read and written by the copies into and out of the buffers of graphs.
        replays: Of graphs.
        rest_ms: What follows the loop: the gradients of the recurrent weight and of the bias.
        together_us: Least time of all steps of the persistent form, meetings included; None where
            it does not fit the device.
    """

    launches: int
    floor_us: float
    copied: int
    replays: int
    rest_ms: float
    together_us: float | None = None

    def ms(self, form: str) -> float:
        """The bound of a form."""
        if form == "launches":
            return max(LAUNCH_US * self.launches, self.floor_us) / 1e3 + self.rest_ms
        if form == "graphs":
            loop = self.floor_us + GRAPH_LAUNCH_US * self.launches + REPLAY_US * self.replays
            return loop / 1e3 + 1e3 * self.copied / BANDWIDTH + self.rest_ms
        if form == "persistent" and self.together_us is not None:
            return self.together_us / 1e3 + self.rest_ms
        raise ValueError(f"form={form!r} is not known; use one of {', '.join(FORMS)}")


FORMS = ("launches", "graphs", "persistent")


def copied_bytes(arguments: dict, roles: graphs.Pass) -> int:
    """Bytes that the copies around all replays of a pass read and write."""
    once = [arguments[name] for name in chain(roles.constant, roles.read, roles.written)]
    twice = [arguments[name] for name in roles.carried]  # into the buffers, and back
    sizes = [x.nbytes for x in chain(once, twice, twice) if isinstance(x, Tensor)]
    return 2 * sum(sizes)


def loop_of(
    floors: list[Resources], together: list[Resources], rows: int, steps: int, heads: int, d: int
) -> Loop:
    """The loop's bound from the counted kernels, forward and then backward.

    Args:
        floors: Of single steps.
        together: Of the persistent form; empty if it fits no call of this width.
        rows: Of the micro-batch.
        steps: Tokens of a row.
        heads: Their number.
        d: Width of a head.

    Raises:
        ValueError: The head fits one program, which does all steps in one launch.
    """
    plans = plan_both(TARGET, d, torch.bfloat16, b=rows, s=steps, heads=heads)
    launches, floor, copied, replays = 0, 0.0, 0, steps // graphs.SEGMENT * 2
    leasts = []
    for one, plan, roles in zip(floors, plans, (scan.FORWARD, scan.BACKWARD), strict=True):
        first = next(plan)
        if first.name != scan.STEP:
            raise ValueError(f"heads of {d} take one launch for all steps; use a larger model")
        count = steps + roles.closing * (1 + steps // graphs.SEGMENT)
        waves = -(-first.grid[0] // (DEVICES[TARGET].processors * max(one.ctas_per_sm, 1)))
        tensors = [first.arguments[name] for name in chain(roles.read, roles.written)]
        moved = sum(x.nbytes for x in tensors if isinstance(x, Tensor)) / steps
        leasts.append(1e6 * moved / BANDWIDTH)
        least = max(waves * (one.floor_us or 0.0), leasts[-1])
        launches, floor = launches + count, floor + count * least
        copied += copied_bytes(first.arguments, roles)
    flops = 2 * 4 * heads * d * d * rows * steps
    read = 2 * rows * steps * heads * d * (4 + 4 + 3)  # gate gradients twice, h shifted and read
    rest = 1e3 * max(flops / BF16_PRODUCTS, read / BANDWIDTH)
    group = plan_group(rows, heads, d, persistent.SIZES[TARGET])
    at_once = None
    if group is not None and together:
        both = zip(together, leasts, strict=True)
        at_once = steps * sum(max((x.floor_us or 0.0) + MEETING_US, y) for x, y in both)
    return Loop(launches, floor, copied, replays, rest, at_once)


def without_loop(block: Pass) -> tuple[Pass, int]:
    """A block without its sLSTM operators, and how many forward passes these were."""
    scans = [one for one in block.kernels if "slstm_scan" in one.name]
    rest = Pass([one for one in block.kernels if "slstm_scan" not in one.name], block.dispatches)
    return rest, sum("backward" not in one.name for one in scans)


def compare(
    mixed: str, plain: str, rows: int, tokens: int, kernels: tuple, recompute: str
) -> list[str]:
    """Lines of one micro-batch size."""
    config = load_config(mixed, quiet=True).model
    letters = Counter(parse_pattern(config.pattern).letters)
    m_block, rest = block_of(plain, "m", tokens, rows, recompute)
    s_block, _ = block_of(mixed, "s", tokens, rows, recompute)
    around, scans = without_loop(s_block)
    assert scans == 1, f"{scans} forward passes of the loop in a block"
    heads, d = config.num_heads, config.hidden_size // config.num_heads
    loop = loop_of(*kernels, rows, tokens, heads, d)
    m_ms, s_ms, rest_ms = (x.totals()["ms"] for x in (m_block, around, rest))
    base = sum(letters.values()) * m_ms + rest_ms
    lines = [
        f"{rows} rows: an m block {m_ms:.2f} ms, an s block without its loop {s_ms:.2f} ms; "
        f"[1:0] {base:.0f} ms"
    ]
    for form in FORMS:
        if form == "persistent" and loop.together_us is None:
            lines.append("  persistent   does not fit: more programs than processors")
            continue
        total = letters["m"] * m_ms + letters["s"] * (s_ms + loop.ms(form)) + rest_ms
        goal = GOALS.get((form, rows))
        verdict = f" (goal {goal}: {'met' if total <= goal * base else 'MISSED'})" if goal else ""
        lines.append(
            f"  {form:12} loop {loop.ms(form):7.2f} ms a block, [7:1] {total:6.0f} ms, "
            f"{total / base:.2f} x [1:0]{verdict}"
        )
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--mixed", default="pretrain/configs/xlstm_1.3b_7to1.yaml")
    parser.add_argument("--plain", default="pretrain/configs/xlstm_1.3b_1to0.yaml")
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16], help="of the micro-batch")
    parser.add_argument("--tokens", type=int, default=2048, help="of a row")
    parser.add_argument("--recompute", default="none")
    options = parser.parse_args(arguments)
    config = load_config(options.mixed, quiet=True).model
    heads, d = config.num_heads, config.hidden_size // config.num_heads
    shape = {"b": 16, "s": options.tokens, "heads": heads}
    floors = [examine(one, TARGET) for one in describe(TARGET, d, torch.bfloat16, **shape)]
    together = [examine(one, TARGET) for one in persistent.describe(TARGET, heads, d)]
    print(f"{options.mixed} beside {options.plain}: bounds on an H100, not times")
    for name, one in zip(("forward", "backward"), floors, strict=True):
        print(f"  a step {name}: >= {one.floor_us:.2f} us by its code, without a launch")
    for name, one in zip(("forward", "backward"), together, strict=False):
        print(f"  a persistent step {name}: >= {one.floor_us:.2f} us, without the meeting")
    print(
        f"assumed: {LAUNCH_US:.0f} us of the host for a launch from Python, {GRAPH_LAUNCH_US} us "
        f"for a node of a graph, {REPLAY_US:.0f} us between replays of {graphs.SEGMENT} steps,\n"
        f"{MEETING_US} us for the meeting of the persistent form's programs at every step"
    )
    for rows in options.rows:
        kernels = floors, together
        lines = compare(
            options.mixed, options.plain, rows, options.tokens, kernels, options.recompute
        )
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
