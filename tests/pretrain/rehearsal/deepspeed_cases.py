"""Rehearsals of the DeepSpeed engine, sound and with planted faults; `cases.py` runs them."""

from unittest import mock

import torch

from pretrain.commands.before_run.rehearse import chosen_ranks, rehearse
from pretrain.config import RunConfig
from pretrain.engines import deepspeed_compat as compat
from pretrain.engines.deepspeed import DeepSpeedEngine
from pretrain.rehearsal.compare import compare_ranks, compare_saved, unexpected_waits
from pretrain.rehearsal.rank import rehearse_rank
from pretrain.rehearsal.record import STEADY
from tests.dist import work
from tests.pretrain.rehearsal.faults import forgotten_wait, missing_receive, wrong_group

RANKS = 2
# (ZeRO stage, changes): two pipeline stages, or two data-parallel replicas.
STAGES = {
    "stage 1": (1, {"layout__pipeline": 2}),
    "stage 2": (2, {}),
    "stage 3": (3, {"model__pattern": "M", "memory__recompute": "cells"}),
}
# Gradients leave for the host, and their norm is there.
OFFLOADED = {"engine__offload": "optimizer", "model__pattern": "M"}
MANY = 64  # replicas, more than there are parameters


def zero_run(stage: int, **changes) -> RunConfig:
    options = {
        "engine__precision": "bf16",
        "engine__name": "deepspeed",
        "engine__zero_stage": stage,
    }
    return work.run_config("large", **options | changes)


def sound(stage: int, changes: dict) -> tuple[dict, list]:
    """What is found in a rehearsal of all ranks, and their records."""
    config = zero_run(stage, **changes)
    done = rehearse(config, RANKS, chosen_ranks(config, RANKS, "all"), jobs=1)
    first = done.records[0]
    found = {
        "mismatches": [str(mismatch) for mismatch in done.mismatches],
        "operations": sorted({m.operation for m in first.messages if m.phase == STEADY}),
        "phases": sorted({m.phase for m in first.messages}),
        "held": first.memory.held,
        "waits": [(wait.what, wait.stack[-1]) for wait, _ in unexpected_waits(first, STEADY)],
        "text": done.text(),
    }
    return found, done.records


GRADIENT_NORM = DeepSpeedEngine.gradient_norm


def norm_and_sum(engine: DeepSpeedEngine) -> torch.Tensor:
    """A norm with a collective that other ranks know nothing of."""
    norm = GRADIENT_NORM(engine)
    torch.distributed.all_reduce(norm.clone())
    return norm


def other_replicas():
    """DeepSpeed is given a group of the same ranks that is not the one of the replicas."""
    make = compat.ModelParallelUnit.__init__

    def with_world(unit, layout):
        make(unit, layout)
        unit.get_data_parallel_group = lambda: torch.distributed.group.WORLD

    return mock.patch.object(compat.ModelParallelUnit, "__init__", with_world)


PARTITION_RANGE = compat.partition_range


def first_partition(parameter: torch.Tensor) -> tuple[int, int]:
    """The range of the first rank's partition, on any rank."""
    start, end = PARTITION_RANGE(parameter)
    return 0, end - start


def faults(stages: dict[str, list]) -> dict:
    """What is found when one rank does something else.

    Args:
        stages: records of all ranks by the name in `STAGES`.
    """
    patch = mock.patch.object

    def record_with(name, rank, fault):
        stage, changes = STAGES[name]
        with fault:
            return rehearse_rank(zero_run(stage, **changes), rank, RANKS)

    def with_rank(name, rank, fault):
        other = record_with(name, rank, fault)
        return [other if record.rank == rank else record for record in stages[name]]

    def added_waits(name, rank, fault):
        """Waits that DeepSpeed does not have by itself: what, and the place."""
        sound, faulty = (
            {(wait.what, wait.stack[-1]) for wait, _ in unexpected_waits(record, STEADY)}
            for record in (stages[name][rank], record_with(name, rank, fault))
        )
        return [*(faulty - sound)]

    one_more = patch(DeepSpeedEngine, "gradient_norm", norm_and_sum)
    again = patch(compat, "partition_range", first_partition)
    return {
        "a sum that one rank alone asks for": [
            str(mismatch) for mismatch in compare_ranks(with_rank("stage 2", 1, one_more))
        ],
        "a slice that two ranks save": [
            str(mismatch) for mismatch in compare_saved(with_rank("stage 3", 1, again), True)
        ],
        "gradients that one rank sums in another group": [
            str(mismatch) for mismatch in compare_ranks(with_rank("stage 2", 1, other_replicas()))
        ],
        "a loss that one rank sums in another group": [
            str(mismatch) for mismatch in compare_ranks(with_rank("stage 1", 1, wrong_group()))
        ],
        "a message that is not received": [
            str(mismatch) for mismatch in compare_ranks(with_rank("stage 1", 1, missing_receive()))
        ],
        "a wait that was left there": added_waits("stage 2", 0, forgotten_wait(DeepSpeedEngine)),
    }


def found() -> dict:
    """Everything, for the tests."""
    stages, records = {}, {}
    for name, (stage, changes) in STAGES.items():
        stages[name], records[name] = sound(stage, changes)
    offloaded = rehearse_rank(zero_run(2, **OFFLOADED), 0, RANKS)
    many = zero_run(2, model__pattern="M", data__global_batch=MANY)
    return {
        "stages": stages,
        "faults": faults(records),
        "offloaded": {"held": offloaded.memory.held, "steps": len(offloaded.operators)},
        "many": [
            rehearse_rank(many, rank, MANY, steps_only=True).memory.held for rank in (0, MANY - 1)
        ],
    }
