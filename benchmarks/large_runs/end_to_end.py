"""What one step of the 7B takes on 64 H100: compute, messages, optimizer and host, by their counts.

    python -m benchmarks.large_runs.end_to_end
    python -m benchmarks.large_runs.end_to_end --recompute full --grad-reduce bf16

**A bound is not a time.** Compute is that of `benchmarks.block_roofline`. Messages and memory are
those that the engine asks for when it plays a rank (`pretrain rehearse`), with gradients and
weights in the order that overlaps them with compute. Four rules put these together:

- A micro-batch takes what its kernels take, or what the host takes to dispatch them, whichever is
  longer.
- Gradients leave during the backward pass of the last micro-batch, and weights come during the
  forward pass of the first. What takes longer than that is exposed.
- The last bucket of gradients and the first one of weights have nothing to hide behind.
- The optimizer follows, with nothing beside it: it reads and writes its partition once.

A node's network carries what its eight GPUs exchange with other nodes. A ring over all ranks leaves
each node once.
"""

import argparse
from dataclasses import dataclass

from benchmarks.block_roofline import Bound, bound_of
from benchmarks.counting.device_limits import BANDWIDTH
from pretrain.config import load_config
from pretrain.planning.estimate import DATA, count_fullest
from pretrain.rehearsal.gpus import GPUS, RESERVE
from xlstm_mcore.recompute import MODES
from xlstm_mcore.sizes.flops import peak_tflops
from xlstm_mcore.sizes.parameters import count_parameters

GPUS_IN_RUN = 64
# GB/s that a node sends to others: 400 Gb/s, and an interface of that speed for every second GPU.
NETWORKS = (50.0, 200.0)
# Seconds of the host for an operator, and for a launch as if all were Triton's: assumptions.
DISPATCH, LAUNCH = 8e-6, 60e-6
# Bytes of the optimizer for a parameter of its partition: master weight, two moments and gradient
# are read, all but the gradient written, and the bf16 weight too.
OPTIMIZER_BYTES = 4 * 4 + 3 * 4 + 2
BUCKET = max(40e6, 1e6 * GPUS_IN_RUN)  # parameters: Megatron's rule


@dataclass
class Step:
    """Seconds of one step.

    Attributes:
        compute: micro-batches, one after the other.
        exposed: messages that nothing hides.
        optimizer: the update.
        tokens: of the step on one GPU.
        model_flops: per token.
    """

    compute: float
    exposed: float
    optimizer: float
    tokens: int
    model_flops: float

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.tokens / (self.compute + self.exposed + self.optimizer)

    @property
    def mfu(self) -> float:
        """The share of an H100's peak."""
        return (
            self.model_flops * self.tokens_per_second / (1e12 * (peak_tflops("NVIDIA H100") or 0))
        )


def step_of(
    bound: Bound, sent: float, gradient_bytes: int, parameters: int, batches: int, network: float
) -> Step:
    """Put the counts together by the rules above.

    Args:
        bound: of a micro-batch.
        sent: bytes of gradients and weights that a rank of a ring over all ranks sends.
        gradient_bytes: of one gradient in its message; a weight has two.
        parameters: of the model.
        batches: micro-batches of a step on one GPU.
        network: GB/s of a node.
    """
    parts = {
        backward: 1e-3
        * (bound.blocks * bound.block.totals(backward)["ms"] + bound.rest.totals(backward)["ms"])
        for backward in (False, True)
    }
    host = sum(
        times * (part.dispatched(when) * DISPATCH + part.totals(when)["launches"] * LAUNCH)
        for part, times in ((bound.block, bound.blocks), (bound.rest, 1))
        for when in (False, True)
    )
    batch = max(parts[False] + parts[True], host)
    seconds = sent / (network * 1e9)
    gradients = seconds * gradient_bytes / (gradient_bytes + 2)
    weights = seconds - gradients
    exposed = sum(
        max(taken - hidden, taken * BUCKET / parameters)
        for taken, hidden in ((gradients, parts[True]), (weights, parts[False]))
    )
    optimizer = parameters / GPUS_IN_RUN * OPTIMIZER_BYTES / BANDWIDTH
    return Step(batches * batch, exposed, optimizer, batches * bound.tokens, bound.model_flops)


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", nargs="?", default="pretrain/configs/xlstm_7b.yaml")
    parser.add_argument("--recompute", default="selective", choices=MODES)
    parser.add_argument("--grad-reduce", default="fp32", choices=("fp32", "bf16"))
    options = parser.parse_args()
    changes = {
        "layout.tensor": 1,
        "layout.sequence": False,
        "memory.recompute": options.recompute,
        "engine.overlap_grad_reduce": True,
        "engine.overlap_param_gather": True,
        "engine.grad_reduce": options.grad_reduce,
    }
    config = load_config(options.config, changes, quiet=True)
    data = config.data
    bound = bound_of(options.config, data.seq_len, data.micro_batch, options.recompute)
    counts = count_fullest(config, GPUS_IN_RUN)
    batches = data.global_batch // (GPUS_IN_RUN * data.micro_batch)
    peak = sum(counts.memory.values())
    free = GPUS["h100"].memory - RESERVE - peak
    print(f"{options.config} on {GPUS_IN_RUN} H100, recompute {options.recompute}: counted")
    print(f"peak {peak / 1e9:.1f} GB, free {free / 1e9:.1f} GB of 80")
    parameters = count_parameters(config.model)["total"]
    gradient_bytes = 4 if options.grad_reduce == "fp32" else 2
    for network in NETWORKS:
        step = step_of(bound, counts.sent[DATA], gradient_bytes, parameters, batches, network)
        print(
            f"{8 * network:,.0f} Gb/s a node: {batches} micro-batches {step.compute:.3f} s, "
            f"messages exposed {step.exposed:.3f} s, optimizer {step.optimizer:.4f} s: "
            f"{step.tokens_per_second:,.0f} tokens/s/GPU, {100 * step.mfu:.1f} % MFU"
        )


if __name__ == "__main__":
    main()
