"""What a layout takes and how fast it can be, from rehearsals of a few of its blocks.

Memory and messages are counted by the rehearsal (`pretrain.rehearsal`) of the same run with two
blocks per letter and stage, and of the same with three of one letter. What a block adds is the
difference, and the rest is multiplication: the layout, the sizes and the number of replicas are
those of the run.

Time is a bound, by the makers' figures and the efficiencies below. Nothing of it was measured on a
GPU.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.config import RunConfig, data_parallel_size, micro_batches
from pretrain.planning.tried import Estimate
from pretrain.rehearsal.gpus import GPUS_PER_NODE, RESERVE, Gpu
from pretrain.rehearsal.rank import rehearse_rank
from pretrain.rehearsal.record import STEADY, RankRecord
from xlstm_mcore.sizes.flops import forward_flops, training_flops

# The share of a GPU's dense bf16 rate that a training step of this model can reach: matrix products
# at three quarters of it, and the elementwise work between them.
EFFICIENCY = 0.54
# What recomputation adds to the forward and backward pass of a block: counted by
# benchmarks/block_roofline.py at the 7B's widths.
EXTRA_WORK = {"none": 0.0, "selective": 0.03, "cells": 0.03, "full": 1 / 3}
# Blocks of a letter that are rehearsed. The peak of a single one can be at the head instead.
_BLOCKS = 2
TENSOR, DATA, PIPELINE = "tensor", "data", "pipeline"
_GROUPS = {"TENSOR_MODEL": TENSOR, "DATA_PARALLEL": DATA, "PIPELINE_MODEL": PIPELINE}


@dataclass(frozen=True)
class Counts:
    """What one rank takes: bytes of memory at its peak by kind, and bytes sent by what for."""

    memory: Mapping[str, float]
    sent: Mapping[str, float]

    def plus(self, other: "Counts", times: float) -> "Counts":
        """The sum with `times` another one, which may be negative."""
        return Counts(
            *(
                {key: a.get(key, 0.0) + times * b.get(key, 0.0) for key in {*a, *b}}
                for a, b in ((self.memory, other.memory), (self.sent, other.sent))
            )
        )


def estimate(config: RunConfig, gpus: int, gpu: Gpu) -> Estimate:
    """Estimate a run on a number of GPUs.

    Args:
        config: the run with its layout, which fits the number of GPUs.
        gpus: how many.
        gpu: which.
    """
    fullest = count_fullest(config, gpus)
    seconds = _seconds(config, gpus, gpu, fullest.sent)
    step = sum(seconds.values())
    tokens = config.tokens_per_step / step
    work = training_flops(config.model, config.data.seq_len) * tokens
    return Estimate(
        fullest.memory,
        seconds,
        tokens,
        work / (gpus * gpu.tflops * 1e12),
        gpu.memory - RESERVE - sum(fullest.memory.values()),
    )


def count_fullest(config: RunConfig, gpus: int) -> Counts:
    """The memory of the fullest rank, and the most that a rank sends, of the first and last stage.

    Args:
        config: the run with its layout, which fits the number of GPUs.
        gpus: how many.
    """
    pipeline = config.layout.pipeline
    counted = [count_rank(config, place, gpus) for place in sorted({0, pipeline - 1})]
    fullest = max(counted, key=lambda counts: sum(counts.memory.values()))
    sent = {
        key: max(counts.sent.get(key, 0.0) for counts in counted)
        for key in (TENSOR, DATA, PIPELINE)
    }
    return Counts(fullest.memory, sent)


def count_rank(config: RunConfig, place: int, gpus: int) -> Counts:
    """Count one rank of a run from rehearsals of a few of its blocks.

    Args:
        config: the run.
        place: of the rank in its pipeline; it is the first one there. With interleaved stages it
            has several.
        gpus: number of ranks.
    """
    pipeline = config.layout.pipeline
    rank, stages = place * gpus // pipeline, config.model.pattern.split("|")
    few = ["".join(c * min(n, _BLOCKS) for c, n in Counter(part).items()) for part in stages]
    base = total = _counts_of(config, few, rank, gpus)
    for own in range(place, len(stages), pipeline):
        for letter, number in Counter(stages[own]).items():
            if number > _BLOCKS:
                more = [part + letter * (at == own) for at, part in enumerate(few)]
                one_more = _counts_of(config, more, rank, gpus).plus(base, -1)
                total = total.plus(one_more, number - _BLOCKS)
    return total


def _counts_of(config: RunConfig, stages: list[str], rank: int, gpus: int) -> Counts:
    model = config.model.model_copy(update={"pattern": "|".join(stages)})
    record = rehearse_rank(config.model_copy(update={"model": model}), rank, gpus, steps_only=True)
    return Counts(dict(record.memory.kinds), _sent(record))


def _sent(record: RankRecord) -> dict[str, float]:
    """Bytes that a rank sends in a step of the run, by what for."""
    rehearsed, real = record.micro_batches
    found: Counter[str] = Counter()
    for message in record.messages:
        if message.phase != STEADY:
            continue
        kind = next((k for name, k in _GROUPS.items() if name in message.group), None)
        if kind is not None:
            # Gradients and weights travel once in a step, everything else with each micro-batch.
            times = 1 if kind == DATA else real / rehearsed
            found[kind] += times * message.wire_bytes()
    return dict(found)


def _seconds(config: RunConfig, gpus: int, gpu: Gpu, sent: Mapping[str, float]) -> dict[str, float]:
    data, layout = config.data, config.layout
    forward = forward_flops(config.model, data.seq_len)
    blocks = 1 - forward["head"] / sum(forward.values())
    work = training_flops(config.model, data.seq_len) * config.tokens_per_step
    work *= 1 + blocks * EXTRA_WORK[config.memory.recompute]
    compute = work / (gpus * gpu.tflops * 1e12 * EFFICIENCY)
    replicas = data_parallel_size(config, gpus)
    number = micro_batches(config, replicas)
    compute *= number * data.micro_batch * replicas / data.global_batch  # with data.fill_batch
    inner = layout.tensor * layout.context
    within = gpu.gbs_node if inner <= GPUS_PER_NODE else gpu.gbs_network
    across = gpu.gbs_node if gpus <= GPUS_PER_NODE else gpu.gbs_network
    # Gradients leave during the last backward pass, and weights come during the first forward pass.
    hidden = compute / number
    return {
        "compute": compute,
        "bubble": compute * (layout.pipeline - 1) / (number * layout.virtual),
        "tensor messages": sent[TENSOR] / (within * 1e9),
        "stage messages": sent[PIPELINE] / (across * 1e9),
        "gradients and weights": max(0.0, sent[DATA] / (across * 1e9) - hidden),
    }
