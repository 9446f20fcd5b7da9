"""Rehearsals with planted faults: run by the tests beside it, in one process.

The device that does not exist stays registered with torch for the life of a process, so this is one
of its own. What was found is printed as JSON.
"""

import json
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.large_runs import first_step
from pretrain import layout as layouts
from pretrain.commands.before_run.rehearse import chosen_ranks, rehearse
from pretrain.config import RunConfig
from pretrain.engines import model
from pretrain.engines.megatron import MegatronEngine
from pretrain.rehearsal import device as rehearsed
from pretrain.rehearsal.compare import compare_ranks, compare_saved, unexpected_waits
from pretrain.rehearsal.device import RehearsalMode, as_rank
from pretrain.rehearsal.memory import GRAPHS
from pretrain.rehearsal.rank import rehearse_rank
from pretrain.rehearsal.record import STEADY, RankRecord
from tests.dist import work
from tests.pretrain.rehearsal.faults import (
    forgotten_wait,
    missing_receive,
    one_sided_collective,
    ring,
    wrong_group,
)
from tests.pretrain.run_files import config as run_file
from xlstm_mcore.megatron import cpu_runtime
from xlstm_mcore.megatron.first_import import import_megatron

WORLD = 8
LAYOUT = {"layout__tensor": 2, "layout__sequence": True, "layout__pipeline": 2}
ALONE = {
    "layout__tensor": 1,
    "layout__sequence": False,
    "layout__pipeline": 1,
    "data__global_batch": 6,
}
SCHEDULES = {
    "interleaved": {
        "layout__pipeline": 3,
        "layout__virtual": 2,
        "model__pattern": "mmmmmm",
    },
    "context": {"layout__context": 2, "model__pattern": "m"},
}


def small_run(**changes) -> RunConfig:
    options = {**LAYOUT, "data__global_batch": 4, "engine__precision": "bf16", **changes}
    return work.run_config("large", **options)


# ------------------------------------------------------------------ planted faults


def other_order_of_groups():
    def sum_losses(losses, layout, sources):
        total = torch.zeros(2, dtype=torch.float64, device=layout.device)
        dist.all_reduce(total, group=layout.groups.mp)
        dist.all_reduce(total)
        return total

    def swapped(losses, layout, sources):
        total = torch.zeros(2, dtype=torch.float64, device=layout.device)
        dist.all_reduce(total)
        dist.all_reduce(total, group=layout.groups.mp)
        return total

    return sum_losses, swapped


def everybody_owns():
    return mock.patch.object(model, "is_owner", lambda parameter, layout: True)


def record_with(fault, config, rank):
    with fault or nullcontext():
        return rehearse_rank(config, rank, WORLD)


def faults() -> dict:
    config = small_run()
    whole = rehearse(config, WORLD, chosen_ranks(config, WORLD, "all"), jobs=1)
    sound = whole.records
    found = {
        "sound": [str(m) for m in whole.mismatches],
        "waits": [str(w) for record in sound for w in unexpected_waits(record, STEADY)],
        "running": sum(len(record.messages) - len(record.ended) for record in sound),
        "text": whole.text(),
        "json": len(json.dumps(whole.as_json())),
    }

    def with_rank(rank, fault):
        other = record_with(fault, config, rank)
        return [other if record.rank == rank else record for record in sound]

    for fault, rank in ((one_sided_collective, 5), (wrong_group, 2), (missing_receive, 4)):
        mismatches = compare_ranks(with_rank(rank, fault()))
        found[fault.__name__] = [str(m) for m in mismatches]
    plain, swapped = other_order_of_groups()
    patch = mock.patch.object
    records = [
        record_with(patch(model, "sum_losses", plain), config, 0),
        record_with(patch(model, "sum_losses", swapped), config, 1),
    ]
    found["other_order_of_groups"] = [str(m) for m in compare_ranks(records)]
    waits = unexpected_waits(record_with(forgotten_wait(MegatronEngine), config, 0), STEADY)
    found["forgotten_wait"] = [(wait.what, wait.stack[-1], count) for wait, count in waits]
    found["everybody_owns"] = [str(m) for m in compare_saved(with_rank(1, everybody_owns()), True)]
    narrow = rehearse_rank(small_run(engine__grad_reduce="bf16"), 0, WORLD)
    found["gradient_bytes"] = [gradient_bytes(record) for record in (sound[0], narrow)]
    found["forms"] = {form: graph_bytes(form) for form in ("graphs", "persistent")}
    muon = small_run(optimizer__name="muon")
    found["rings"] = rings()
    found["schedules"] = {name: schedule(changes) for name, changes in SCHEDULES.items()}
    with waits_at_every_message():
        waits = unexpected_waits(rehearse_rank(config, 0, WORLD, steps_only=True), STEADY)
    found["waits_of_messages"] = [(wait.what, wait.stack[-1]) for wait, _ in waits]
    checked = [message for message in sound[0].messages if message.phase == "replica check"]
    found["replica_check"] = sorted({message.operation for message in checked})
    found["muon"] = [str(m) for m in compare_ranks([rehearse_rank(muon, r, WORLD) for r in (0, 1)])]
    start = first_step.parts(config, WORLD, first_step.Rates(2.0, 0.5, 1e-3, 1e-9, 1e-9))
    found["start"] = {part.name: part.seconds for part in start}
    found["start"]["text"] = first_step.text(start)
    found["start"] |= {kind: first_step.total(start, kind) for kind in ("first", "later")}
    found["a rank missing"] = [
        len(compare_saved(sound[1:], True)),
        len(compare_saved(sound[1:], False)),
    ]
    return found


def rings() -> dict[str, list[str]]:
    """What is found in rings of single messages and of batches, by size and way."""
    orders = {"receive first": (dist.irecv, dist.isend), "send first": (dist.isend, dist.irecv)}

    def played(size: int, *operations, batch: bool = False) -> list[str]:
        records = [RankRecord(rank) for rank in range(size)]
        for rank, record in enumerate(records):
            mode = RehearsalMode(record)
            with as_rank(rank, size, mode):
                layout = layouts.start(small_run(**ALONE))
                try:
                    with mode:
                        ring(layout.groups.dp, *operations, batch=batch)
                finally:
                    layout.close()
        return [str(mismatch) for mismatch in compare_ranks(records)]

    found = {
        f"{size} {name}": played(size, *operations)
        for size in (2, 3)
        for name, operations in orders.items()
    }
    return found | {"batch": played(3, *orders["receive first"], batch=True)}


def schedule(changes: dict) -> list[str]:
    """What is found in the steps of other ways to send messages."""
    config = small_run(**ALONE | changes)
    ranks = config.layout.pipeline * config.layout.context
    records = [rehearse_rank(config, rank, ranks, steps_only=True) for rank in range(ranks)]
    assert any(message.operation == "send" for message in records[0].messages)
    return [str(mismatch) for mismatch in compare_ranks(records)]


def waits_at_every_message():
    """Megatron's own default."""
    settings = cpu_runtime.pipeline_settings
    return mock.patch.object(
        cpu_runtime, "pipeline_settings", lambda *of: settings(*of) | {"batch_p2p_sync": True}
    )


def graph_bytes(form: str) -> int:
    """What the sLSTM's graphs take at the peak, with 2 rows of 256 tokens and 4 heads of 272."""
    config = run_file(
        model__pattern="ss",
        model__hidden_size=4 * 272,
        engine__precision="bf16",
        data__micro_batch=2,
        memory__slstm_form=form,
    )
    return rehearse_rank(config, 0, 1, steps_only=True).memory.kinds.get(GRAPHS, 0)


def gradient_bytes(record) -> float:
    """Bytes of gradients that a rank sends to the other replicas in a step."""
    return sum(
        message.wire_bytes()
        for message in record.messages
        if message.phase == STEADY
        and message.operation.startswith("reduce_scatter")
        and "DATA_PARALLEL" in message.group
    )


if __name__ == "__main__":
    import_megatron()
    rehearsed.device()  # before the first backward pass, which counts the devices that there are
    results = {"faults": faults()}
    if find_spec("deepspeed"):
        from tests.pretrain.rehearsal import deepspeed_cases

        results["deepspeed"] = deepspeed_cases.found()
    json.dump(results, sys.stdout)
