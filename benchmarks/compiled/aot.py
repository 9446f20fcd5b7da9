"""Compiles kernel variants for GPUs that are not there, and counts what the compiler made of them.

`compile_variant` needs Triton and the NVIDIA tools in its wheel, but neither a GPU nor a CUDA
toolkit. All results are properties of the code or bounds that follow from data sheets. None is a
measured time.
"""

import json
import math
import os
import re
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.compiled.assembly import Listing, LoopCount
from benchmarks.compiled.latency import step_floor, step_walk
from benchmarks.compiled.wgmma import overwritten_operands, register_operands
from benchmarks.kernel_variants import Variant


@dataclass(frozen=True)
class Device:
    """What the counts are held against: the data sheet of one GPU of a target."""

    name: str
    backend: str
    arch: int | str
    warp: int
    processors: int  # SMs or CUs
    registers: int  # 32-bit, of one SM; on AMD of one lane of one SIMD
    shared: int  # bytes of shared memory of one SM
    reserved: int  # bytes of it that each block costs beside its own
    threads: int  # resident threads of one SM
    bandwidth: float  # bytes/s
    flops: float  # bf16 tensor-core FLOP/s, 0.8 of the data sheet
    clock: float  # Hz


DEVICES = {
    "sm_80": Device(
        "A100", "cuda", 80, 32, 108, 65536, 164 << 10, 1024, 2048, 2.04e12, 2.5e14, 1.41e9
    ),
    "sm_90": Device(
        "H100", "cuda", 90, 32, 132, 65536, 228 << 10, 1024, 2048, 3.35e12, 8e14, 1.83e9
    ),
    "sm_100": Device(
        "B200", "cuda", 100, 32, 148, 65536, 228 << 10, 1024, 2048, 8e12, 1.8e15, 1.85e9
    ),
    "gfx942": Device(
        "MI300X", "hip", "gfx942", 64, 304, 512, 64 << 10, 0, 2048, 5.3e12, 1.05e15, 2.1e9
    ),
}


@dataclass
class Resources:
    """What one variant became on one target. Bytes of spills are per thread."""

    name: str
    target: str
    setting: str
    phase: str
    count: int
    registers: int
    spill_store: int
    spill_load: int
    stack: int
    shared: int
    num_warps: int
    num_stages: int
    tensor: dict[str, int]
    loop: LoopCount | None  # the main loop
    unrolled: int  # iterations that the assembler made into one
    loops: int  # loops that do work
    loops_waiting: int  # those of them that load from global memory, but only by waiting
    ctas_per_sm: int
    flight_per_sm: int  # bytes of asynchronous copies under way in the main loop
    grid: tuple[int, ...]
    wave_efficiency: float
    bytes: int
    flops: int
    bound_us: float
    steps: int  # time steps that one launch does
    floor_us: float | None  # least time of one of them, without a launch; not counted on AMD
    floor_by: dict[str, float]  # cycles of that step by what sets the limit
    waiting: dict[str, float]  # what one warp does in that step: see benchmarks/compiled/latency.py
    from_registers: int  # asynchronous products with an operand in registers: see wgmma.py
    overwritten: list[str]  # writes to these operands that no wait comes before
    unwaited: int  # such writes if the waits were not there
    compile_s: float = 0.0
    limits: list[str] = field(default_factory=list)  # why it could not be launched
    cooperative: bool = False  # all programs run at the same time, and meet at every step


def triton_tool(name: str) -> Path:
    """One of the NVIDIA programs inside Triton's wheel."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def compile_variant(variant: Variant, target: str):
    """The compiled kernel of `variant` for one of `DEVICES`; raises what Triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Triton 3.10 will change the default; the kernels are written and counted with fusion.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    device = DEVICES[target]
    # As a launch has them, which would not find this kernel in the cache: a constant, and what
    # could be a multiple of 16 and is not, have an empty list.
    plain = {p.name for p in variant.fn.params if p.do_not_specialize}
    attrs = {
        (number,): [["tt.divisibility", 16]] if name in variant.aligned() else []
        for number, (name, kind) in enumerate(variant.signature.items())
        if kind == "constexpr" or (kind.startswith(("*", "i")) and name not in plain)
    }
    source = ASTSource(variant.fn, variant.signature, variant.constexprs, attrs)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    if variant.cooperative:
        options["launch_cooperative_grid"] = True
    gpu = GPUTarget(device.backend, device.arch, device.warp)
    return triton.compile(source, target=gpu, options=options)


def examine(variant: Variant, target: str) -> Resources:
    """Compile `variant` and count its resources; raises what the compiler raises."""
    start = time.monotonic()
    compiled = compile_variant(variant, target)
    device, amd = DEVICES[target], target.startswith("gfx")
    shared = compiled.metadata.shared
    if amd:
        listing = Listing(compiled.asm["amdgcn"], "amd")
        about = compiled.asm["amdgcn"]
        registers = _amd_number(about, "vgpr_count")
        spill = 4 * _amd_number(about, "vgpr_spill_count")
        store, load = spill, spill
        stack = _amd_number(about, "private_segment_fixed_size")
    else:
        listing, registers, stack = _disassemble(compiled.asm["cubin"])
        store, load = listing.local_bytes()
    tensor_memory = 0 if amd else getattr(compiled.metadata, "tmem_size", 0) or 0
    ctas = blocks_per_processor(device, variant.num_warps, registers, shared, tensor_memory)
    loops = listing.main_loops(outermost=variant.steps > 1)
    loop = loops[0] if loops else None
    unrolled = (
        1 if amd else unrolling(loops, Listing(compiled.asm["ptx"], "ptx"), variant.steps > 1)
    )
    threads = variant.num_warps * device.warp
    flight = loop.flight * threads * ctas if loop else 0
    floor_by, waiting = {}, {}
    if variant.steps and loop and not amd:
        innermost = unrolled
        if variant.inner_loops and variant.steps > 1:
            innermost = unrolling(
                listing.main_loops(), Listing(compiled.asm["ptx"], "ptx"), outermost=False
            )
        launched = variant.steps == 1
        walked = step_walk(listing, variant.inner_loops, innermost, launched)
        floor_by = step_floor(walked, variant.num_warps, variant.step_bytes)
        waiting = {"instructions": walked.instructions} | dict(walked.waited)
    overwritten = [] if amd else overwritten_operands(listing)
    blocks = math.prod(variant.grid)
    slots = max(ctas, 1) * device.processors
    limits = [] if ctas else [f"{shared} bytes of shared memory or {registers} registers: too many"]
    return Resources(
        name=variant.name,
        target=target,
        setting=variant.setting,
        phase=variant.phase,
        count=variant.count,
        registers=registers,
        spill_store=store,
        spill_load=load,
        stack=stack,
        shared=shared,
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        tensor=listing.tensor_names(),
        loop=loop,
        unrolled=unrolled,
        loops=len(loops),
        loops_waiting=0 if amd else sum(1 for x in loops if x.loads and not x.async_copies),
        ctas_per_sm=ctas,
        flight_per_sm=flight,
        grid=tuple(variant.grid),
        wave_efficiency=blocks / (math.ceil(blocks / slots) * slots),
        bytes=variant.bytes,
        flops=variant.flops,
        bound_us=1e6 * max(variant.bytes / device.bandwidth, variant.flops / device.flops),
        steps=variant.steps,
        floor_us=1e6 * max(floor_by.values()) / device.clock if floor_by else None,
        floor_by=floor_by,
        waiting=waiting,
        from_registers=0 if amd else len(register_operands(listing)),
        overwritten=[one.describe(listing) for one in overwritten],
        unwaited=0 if amd else len(overwritten_operands(listing, waits=False)),
        compile_s=time.monotonic() - start,
        limits=limits,
        cooperative=variant.cooperative,
    )


def unrolling(loops: list[LoopCount], ptx: Listing, outermost: bool) -> int:
    """How many iterations of the main loop the assembler made into one."""
    before = ptx.main_loops(outermost=outermost)
    if not loops or not before:
        return 1
    for name in ("tensor", "barriers"):
        if count := getattr(before[0], name):
            return max(1, round(getattr(loops[0], name) / count))
    return 1


def blocks_per_processor(
    device: Device, num_warps: int, registers: int, shared: int, tensor_memory: int = 0
) -> int:
    """Thread blocks that fit one SM or CU at the same time; 0 if not even one does."""
    fits = [device.threads // (num_warps * device.warp)]
    if device.backend == "hip":  # 4 SIMDs, each with `registers` for every lane
        waves = min(device.registers // max(_round_up(registers, 8), 1), 8)
        fits.append(4 * waves // num_warps)
    else:
        per_warp = _round_up(registers, 8) * device.warp
        fits.append(device.registers // per_warp // 4 * 4 // num_warps)
        fits.append(32)
    fits.append(device.shared // (_round_up(shared, 128) + device.reserved or 1))
    if tensor_memory:  # columns of tensor memory, 512 on an SM
        fits.append(512 // tensor_memory)
    return min(fits)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _disassemble(cubin: bytes) -> tuple[Listing, int, int]:
    """Listing, registers and stack bytes of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(triton_tool("cuobjdump"), "-res-usage", file.name)
        sass = _output(triton_tool("nvdisasm"), "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    return Listing(sass, "sass"), int(found.group(1)), int(found.group(2))


def _output(*command: object) -> str:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return result.stdout


def _amd_number(assembly: str, key: str) -> int:
    found = re.search(rf"\.{key}:\s+(\d+)", assembly)
    return int(found.group(1)) if found else 0


def write_json(path: Path, results: list[Resources], **about: object) -> None:
    """Results and what they are about, one JSON file."""
    rows = [asdict(result) for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | {"kernels": rows}, indent=1) + "\n", encoding="utf-8")
