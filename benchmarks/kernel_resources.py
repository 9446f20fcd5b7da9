"""What compilers make of every Triton kernel, counted without a GPU.

    python -m benchmarks.kernel_resources                 a seeded sample, the 7B and 125M settings
    python -m benchmarks.kernel_resources --all           every variant
    python -m benchmarks.kernel_resources --only 7b --targets sm_90

Compiles for sm_80, sm_90, sm_100 and gfx942 and prints for each kernel registers, spills, shared
memory, tensor-core instructions, and for its main loop the asynchronous copies, barriers and full
waits. Then come the bytes in flight per SM, the blocks that fit an SM, how well the grid fills
whole waves, bytes, FLOPs and the bound that follows from them. **A bound is not a time**:
published times of such kernels are 1.8 to 5.2 times their bound, and the best chunk by bound is not
the best by time. The JSON has the same numbers. Needs triton, but neither a GPU nor a CUDA toolkit.
"""

import argparse
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

from benchmarks.compiled.anchors import ANCHOR_TABLE
from benchmarks.compiled.aot import DEVICES, Resources, examine, write_json
from benchmarks.kernel_variants import MODULE, TARGETS, Variant, find_variants

SEED, SAMPLE, SAMPLED_SETTINGS = 2405, 24, ("7b", "125m")
MOST_LAUNCHES, LEAST_FLIGHT = 6, 20_000  # forward + backward at 7B; bytes per SM
BOUND_LIMITS = {"7b": 450.0, "7b fp32 states": 580.0}  # us on an H100
GRAPH_LAUNCH_US = 1.3  # one kernel of a CUDA graph after another; published, not measured here

MEETING_US = 1.2  # programs of a cooperative launch wait for each other; assumed
STEP_GOAL_US = 3.5  # a step of the persistent sLSTM forward at heads of 512, meeting included

Failure = tuple[str, str, str]  # target, variant, message


@cache
def variants(module: str, target: str) -> dict[str, Variant]:
    """The variants of a target by name."""
    return {variant.name: variant for variant in find_variants(target, module)}


def choose(module: str, target: str, *, everything: bool, only: list[str], seed: int) -> list[str]:
    """Names of the variants to compile: all, those of some settings, or settings and a sample.

    The sample is spread over the targets: each has every fourth of the names that were drawn.
    """
    known = variants(module, target)
    if only:
        return [name for name, one in known.items() if one.setting.startswith(tuple(only))]
    if everything:
        return list(known)
    settings = [name for name, one in known.items() if one.setting in SAMPLED_SETTINGS]
    rest = sorted(set(known) - set(settings))
    sample = random.Random(seed).sample(rest, min(SAMPLE, len(rest)))
    return settings + sample[TARGETS.index(target) :: len(TARGETS)]


def work(task: tuple[str, str, str]) -> Resources | Failure:
    """Compile and count one (module, target, name); runs in a worker."""
    module, target, name = task
    try:
        return examine(variants(module, target)[name], target)
    except Exception as error:
        return target, name, f"{type(error).__name__}: {error}"


def run(tasks: list[tuple[str, str, str]], jobs: int) -> tuple[list[Resources], list[Failure]]:
    """Results and failures of all tasks, in order; progress as a line, or as lines in a log."""
    results, failures = [], []
    terminal = sys.stderr.isatty()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for number, one in enumerate(pool.map(work, tasks), 1):
            (results if isinstance(one, Resources) else failures).append(one)
            _, target, name = tasks[number - 1]
            if terminal:
                print(f"\r{number}/{len(tasks)} {target} {name:60.60}", end="", file=sys.stderr)
            elif number % 20 == 0:
                print(f"{number}/{len(tasks)} compiled", file=sys.stderr, flush=True)
    if terminal:
        print(file=sys.stderr)
    return results, failures


COLUMNS = (
    "kernel", "regs", "spill", "smem", "w/st", "tensor", "async", "bar", "wait", "KB/SM", "CTA/SM",
    "grid", "waves", "MB", "GFLOP", "bound us",
)  # fmt: skip


def row(one: Resources) -> list[str]:
    """One line of the table; see `explain`."""
    loop = one.loop
    tensor = " ".join(f"{name}:{count}" for name, count in sorted(one.tensor.items())) or "-"
    times = f"{one.count} x " if one.count > 1 else ""
    blocked = f" CANNOT LAUNCH ({one.limits[0]})" if one.limits else ""
    return [
        one.name + blocked,
        str(one.registers),
        f"{one.spill_store}/{one.spill_load}",
        str(one.shared),
        f"{one.num_warps}/{one.num_stages}",
        tensor,
        (f"{loop.async_copies}" + "!" * bool(one.loops_waiting)) if loop else "-",
        str(loop.barriers) if loop else "-",
        str(loop.full_waits) if loop else "-",
        f"{one.flight_per_sm / 1e3:.0f}",
        str(one.ctas_per_sm),
        "x".join(map(str, one.grid)),
        f"{one.wave_efficiency:.0%}",
        f"{one.bytes / 1e6:.0f}",
        f"{one.flops / 1e9:.1f}",
        f"{times}{one.bound_us:.1f}",
    ]


def explain() -> str:
    """What the columns are."""
    return (
        "spill: bytes stored/loaded per thread. w/st: warps/stages. tensor: instructions in the "
        "code.\nasync, bar, wait: asynchronous copies, barriers and full waits in the main loop "
        "(after unrolling by\nthe assembler); ! = another working loop loads only by waiting. "
        "KB/SM: bytes in flight in the main\nloop, all blocks of an SM. waves: part of whole waves "
        "that the grid fills. bound: bytes or FLOPs,\nwhichever takes longer at the data sheet's "
        "bandwidth and 0.8 of its FLOP/s. A bound is not a time."
    )


FLOORS = f"""\
The least time of one step, whatever the batch up to 16 rows: the largest of the dependencies of
one warp (in order; smallest published latencies), the issue of all warps, and the weights that are
read from L2 again at every step. `one warp` has its instructions, and the cycles that it waits for
each kind of result. A step that is a launch of its own adds {GRAPH_LAUNCH_US} us: one kernel of a
CUDA graph after another, published, not measured here. Where programs meet at every step, that
takes {MEETING_US} us more, which is an assumption until a GPU has run it. Clocks are the boost
clocks of data sheets. Not counted for AMD. A floor is not a time."""


def table(rows: list[list[str]]) -> str:
    """Text table with a header; first column left, others right."""
    lines = [list(COLUMNS), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def met(condition: bool) -> str:
    """How a goal came out."""
    return "met" if condition else "MISSED"


def summary(results: list[Resources], setting: str, target: str) -> list[str]:
    """Totals of one setting; beside the project's goals where these were set for it."""
    chosen = [one for one in results if one.setting == setting and one.target == target]
    passes = [one for one in chosen if one.phase in ("gates", "fw", "bw")]
    if not passes or not setting:
        return []
    launches = {p: sum(o.count for o in passes if o.phase == p) for p in ("gates", "fw", "bw")}
    bounds = {p: sum(o.count * o.bound_us for o in passes if o.phase == p) for p in launches}
    total, count = sum(bounds.values()), launches["fw"] + launches["bw"]
    lines = [
        f"launches: {launches['gates']} for gates, {launches['fw']} fw, {launches['bw']} bw",
        f"counted bound: gates {bounds['gates']:.0f} + fw {bounds['fw']:.0f} + bw "
        f"{bounds['bw']:.0f} = {total:.0f} us",
    ]
    loaded = [o for o in passes if o.phase != "gates" and o.loop and o.tensor]
    if loaded:
        least = min(loaded, key=lambda one: one.flight_per_sm)
        waiting = ", ".join(one.name for one in loaded if one.loops_waiting)
        lines.append(f"least in flight: {least.flight_per_sm / 1e3:.0f} KB/SM in {least.name}")
        lines.append(f"working loops without asynchronous copies in: {waiting or 'no kernel'}")
    if target == "sm_90" and setting in BOUND_LIMITS and loaded:
        limit = BOUND_LIMITS[setting]
        lines[0] += f" (goal: fw + bw <= {MOST_LAUNCHES}: {met(count <= MOST_LAUNCHES)})"
        lines[1] += f" (goal: <= {limit:.0f}: {met(total <= limit)})"
        enough = least.flight_per_sm >= LEAST_FLIGHT
        lines[2] += f" (goal: >= {LEAST_FLIGHT // 1000}: {met(enough)})"
        lines[3] += f" (goal: none: {met(not waiting)})"
    return [f"  {line}" for line in lines]


def latency(results: list[Resources]) -> list[str]:
    """Floors of the kernels that walk over time, one line each; the papers' sizes first."""
    lines = []
    for one in sorted(results, key=lambda one: (one.target, one.setting == "")):
        if one.floor_us is None:
            continue
        launched = one.steps == 1
        step = one.floor_us + GRAPH_LAUNCH_US * launched
        limits = ", ".join(f"{name} {cycles:.0f}" for name, cycles in one.floor_by.items())
        waits = ", ".join(
            f"{name} {cycles:.0f}" for name, cycles in one.waiting.items() if cycles >= 1
        )
        beside = f" ({GRAPH_LAUNCH_US} of them the launch)" if launched else ""
        if one.cooperative:
            beside = f", and {MEETING_US} us assumed for the meeting"
            if one.target == "sm_90" and one.name.startswith("slstm persistent fw d512"):
                enough = step + MEETING_US <= STEP_GOAL_US
                beside += f" (goal: both <= {STEP_GOAL_US}: {met(enough)})"
        lines.append(
            f"  {one.target}  {one.name}: >= {step:.2f} us a step{beside}; "
            f"cycles: {limits}; one warp: {waits}"
        )
    return lines


def report(results: list[Resources], failures: list[Failure]) -> None:
    """Print everything."""
    for target in TARGETS:
        for setting in sorted({one.setting for one in results}):
            chosen = [o for o in results if o.target == target and o.setting == setting]
            if chosen:
                print(f"\n## {target} ({DEVICES[target].name}): {setting or 'other variants'}")
                print(table([row(one) for one in chosen]))
                print("\n".join(summary(results, setting, target)))
    print(f"\n{explain()}")
    if floors := latency(results):
        print("\n## Latency floors of the recurrence, per time step: bounds, not times")
        print(FLOORS)
        print("\n".join(floors))
    print(f"\n{ANCHOR_TABLE}")
    spilling = [o for o in results if o.spill_store and o.target in ("sm_80", "sm_90")]
    print(f"\n{len(results)} kernels compiled, {len(failures)} failed, {len(spilling)} spill on "
          "sm_80 or sm_90")  # fmt: skip
    for one in spilling:
        print(f"  {one.target} {one.name}: {one.spill_store}/{one.spill_load} bytes")
    asynchronous = sum(one.from_registers for one in results)
    overwriting = [one for one in results if one.overwritten]
    print(f"{asynchronous} asynchronous products have an operand in registers, {len(overwriting)} "
          "kernels overwrite one too early (benchmarks/compiled/wgmma.py)")  # fmt: skip
    for one in overwriting:
        print(f"  {one.target} {one.name}: {'; '.join(one.overwritten)}")
    for target, name, message in failures:
        print(f"  FAILED {target} {name}: {message[:600]}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--all", action="store_true", help="every variant, not a sample")
    parser.add_argument("--only", default="", help="settings such as 7b,125m, and nothing else")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the sample of {SAMPLE}")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, default=Path("build/kernel_resources.json"))
    parser.add_argument("--module", default=MODULE, help="has the function triton_variants")
    chosen = parser.parse_args(arguments)
    chosen.targets = chosen.targets.split(",")
    chosen.only = [name for name in chosen.only.split(",") if name]
    if unknown := [name for name in chosen.targets if name not in TARGETS]:
        parser.error(f"--targets {unknown[0]} is not known; use some of {','.join(TARGETS)}")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """Compile, print, write JSON; 1 if a kernel is not compiled or wrong, 2 for bad input."""
    chosen = parse_arguments(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's functions cannot be compiled
    if find_spec("triton") is None:
        print("triton is not installed: pip install triton", file=sys.stderr)
        return 2
    start = time.monotonic()
    tasks = [
        (chosen.module, target, name)
        for target in chosen.targets
        for name in choose(
            chosen.module, target, everything=chosen.all, only=chosen.only, seed=chosen.seed
        )
    ]
    if not tasks:
        print(f"no variants found in {chosen.module} for this choice", file=sys.stderr)
        return 2
    results, failures = run(tasks, chosen.jobs)
    report(results, failures)
    import triton

    write_json(
        chosen.json,
        results,
        triton=triton.__version__,
        seed=chosen.seed,
        failures=failures,
        wall_s=round(time.monotonic() - start, 1),
    )
    print(f"{time.monotonic() - start:.0f} s; {chosen.json}")
    return 1 if failures or any(one.overwritten for one in results) else 0


if __name__ == "__main__":
    sys.exit(main())
