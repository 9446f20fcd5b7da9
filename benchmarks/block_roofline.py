"""Bytes, operations, launches and the bound that follows, of one block of a model that trains.

    python -m benchmarks.block_roofline
    python -m benchmarks.block_roofline pretrain/configs/xlstm_1.3b_1to0.yaml --tokens 2048 --rows 4
    python -m benchmarks.block_roofline --ops

The engine of a run file runs one micro-batch, forward and backward, with two blocks and with three,
on tensors without data. The difference is a block, and the rest is embedding, head and loss. **A
bound is not a time**: what it leaves out are communication, the optimizer, the host, and everything
that keeps a kernel from the rates in benchmarks/counting/device_limits.py.
"""

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass, field

import torch

from benchmarks.counting.counted_ops import CountingMode, Kernel, by_name
from benchmarks.counting.device_limits import BF16_PRODUCTS
from pretrain import layout as layouts
from pretrain.config import RunConfig, load_config
from pretrain.data import Batch
from pretrain.engines.megatron import MegatronEngine
from pretrain.rehearsal.device import as_rank
from xlstm_mcore.pattern import parse_pattern
from xlstm_mcore.recompute import MODES
from xlstm_mcore.sizes.flops import peak_tflops, training_flops


@dataclass
class Pass:
    """What a part of the model does in one micro-batch.

    Attributes:
        kernels: what it launches.
        dispatches: operators that reached the device, views included: how many of each name,
            forward (False) and backward (True).
    """

    kernels: list[Kernel] = field(default_factory=list)
    dispatches: Counter[tuple[str, bool]] = field(default_factory=Counter)

    def minus(self, other: "Pass") -> "Pass":
        """What this one does more than another."""
        rest = Counter(self.kernels)
        rest.subtract(Counter(other.kernels))
        kernels = [kernel for kernel, times in rest.items() for _ in range(times)]
        dispatches = Counter(self.dispatches)
        dispatches.subtract(other.dispatches)
        return Pass(kernels, dispatches)

    def dispatched(self, backward: bool) -> int:
        """Dispatches of one pass."""
        return sum(times for (_, when), times in self.dispatches.items() if when == backward)

    def totals(self, backward: bool | None = None) -> dict[str, float]:
        """Launches, MB, GFLOP and ms of all kernels, or of those of one pass."""
        some = [k for k in self.kernels if backward is None or k.backward == backward]
        return {
            "launches": len(some),
            "mb": sum(k.bytes for k in some) / 1e6,
            "gflop": sum(k.flops for k in some) / 1e9,
            "ms": 1e3 * sum(k.seconds for k in some),
        }


def count_model(config: RunConfig) -> Pass:
    """One micro-batch of a whole run, forward and backward."""
    mode = CountingMode()
    with as_rank(0, 1, mode):
        layout = layouts.start(config)
        try:
            with mode:
                engine = MegatronEngine(config, layout)
                shape = config.data.micro_batch, config.data.seq_len
                tokens = torch.zeros(shape, dtype=torch.int64)
                marks = torch.zeros(shape, dtype=torch.bool)
                no_sources = torch.zeros(len(tokens), 0, dtype=torch.float64)
                batch = Batch(tokens, tokens, torch.ones(shape), marks, no_sources)
                for mode.counting in (False, True):  # the first one may set things up
                    engine._run([batch], forward_only=False)
                mode.counting = False
                engine.close()
        finally:
            layout.close()
    return Pass(mode.kernels, Counter(mode.dispatches))


def of_run(
    path: str, letter: str, blocks: int, tokens: int, rows: int, recompute: str
) -> RunConfig:
    """A run file with some blocks of one kind, in one process."""
    return load_config(
        path,
        {
            "run.dir": "unused",
            "model.pattern": letter * blocks,
            "model.vocab_tokens": None,
            **{f"layout.{name}": 1 for name in ("tensor", "pipeline", "virtual", "context")},
            "layout.sequence": False,
            "engine.precision": "bf16",
            "memory.recompute": recompute,
            "data.path": "unused",
            "data.seq_len": tokens,
            "data.global_batch": rows,
            "data.micro_batch": rows,
            "data.batch_ramp": [],
        },
        quiet=True,
    )


def block_of(path: str, letter: str, tokens: int, rows: int, recompute: str) -> tuple[Pass, Pass]:
    """A block of one kind, and embedding, head and loss."""
    two, three = (
        count_model(of_run(path, letter, blocks, tokens, rows, recompute)) for blocks in (2, 3)
    )
    block = three.minus(two)
    return block, two.minus(block).minus(block)


@dataclass
class Bound:
    """A model as the sum of its parts, for one micro-batch.

    Attributes:
        block: one block.
        rest: embedding, head and loss.
        blocks: how many blocks the model has.
        tokens: of the micro-batch.
        model_flops: of the model's products per token, forward and backward, nothing twice.
    """

    block: Pass
    rest: Pass
    blocks: int
    tokens: int
    model_flops: float

    @property
    def ms(self) -> float:
        """The bound of the whole model."""
        return self.blocks * self.block.totals()["ms"] + self.rest.totals()["ms"]

    @property
    def mfu(self) -> float:
        """The share of an H100's peak that the bound stands for."""
        peak = 1e12 * (peak_tflops("NVIDIA H100") or 0)
        return self.model_flops * self.tokens / (self.ms / 1e3) / peak


def bound_of(path: str, tokens: int, rows: int, recompute: str) -> Bound:
    """Count a run file's model by its most frequent block."""
    model = load_config(path, quiet=True).model
    letters = parse_pattern(model.pattern).letters
    letter, _ = Counter(letters).most_common(1)[0]
    block, rest = block_of(path, letter, tokens, rows, recompute)
    model = model.model_copy(update={"pattern": letter * len(letters)})
    return Bound(block, rest, len(letters), rows * tokens, training_flops(model, tokens))


def describe(bound: Bound, ops: bool) -> list[str]:
    """The counts as lines."""
    lines = [f"{'':32} launches dispatches       MB     GFLOP       ms"]
    for name, part in (("block", bound.block), ("embedding, head, loss", bound.rest)):
        for title, backward in (("forward", False), ("backward", True)):
            t = part.totals(backward)
            lines.append(
                f"{name + ' ' + title:32.32} {t['launches']:8} {part.dispatched(backward):10} "
                f"{t['mb']:8,.0f} {t['gflop']:9,.0f} {t['ms']:8.3f}"
            )
            if ops:
                lines += _by_operator(part, title, backward)
    per_second = bound.tokens / (bound.ms / 1e3)
    lines.append(
        f"{bound.blocks} blocks and the rest: {bound.ms:.0f} ms for {bound.tokens:,} tokens, "
        f"{per_second:,.0f} tokens/s, {100 * bound.mfu:.1f} % MFU"
    )
    return lines


def _by_operator(part: Pass, title: str, backward: bool) -> list[str]:
    """A line for each kernel by its time, then one for each operator by its dispatches."""
    lines = []
    for op, kernels in by_name([k for k in part.kernels if k.backward == backward]):
        each = Pass(kernels).totals()
        lines.append(
            f"    {title} {op:36.36} {len(kernels):3} {each['mb']:10,.1f} {each['ms']:8.3f}"
        )
    for (op, when), times in sorted(part.dispatches.items(), key=lambda item: -item[1]):
        if when == backward and times:
            lines.append(f"    {title} {times:3} x {op}")
    return lines


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", nargs="?", default="pretrain/configs/xlstm_7b.yaml")
    parser.add_argument("--tokens", type=int, default=8192, help="of a row")
    parser.add_argument("--rows", type=int, default=1, help="of the micro-batch")
    parser.add_argument("--recompute", default="selective", choices=MODES)
    parser.add_argument("--ops", action="store_true", help="print every operator")
    parser.add_argument("--json", metavar="FILE", help="write every kernel there")
    options = parser.parse_args()
    bound = bound_of(options.config, options.tokens, options.rows, options.recompute)
    print(f"{options.config}, {options.recompute} recompute: counted, not measured")
    print(f"products at {BF16_PRODUCTS / 1e12:.0f} TFLOP/s; see benchmarks.counting.device_limits")
    print("\n".join(describe(bound, options.ops)))
    if options.json:
        parts = {"block": bound.block, "rest": bound.rest}
        found = {name: [asdict(k) for k in part.kernels] for name, part in parts.items()}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main()
