"""What to change first in a run that ran out of memory, with the plan's count of each change.

    python -m pretrain.planning.advice < '{"config": {...}, "processes": 8, "bytes": 80000000000}'

Counting plays ranks on tensors without data (`pretrain.rehearsal`), which changes the process that
does it. So the rank that ran out asks in a process of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pretrain.config import ConfigError, RunConfig, config_from_dict
from pretrain.planning.layouts import RECOMPUTE, Layout, with_layout
from pretrain.rehearsal.gpus import RESERVE

SECONDS = 180.0  # after which a rank no longer waits for the numbers


def steps_down(config: RunConfig) -> Iterator[tuple[str, Layout]]:
    """Changes that take less and less memory, what costs the least time first.

    Args:
        config: the run.

    Yields:
        What to say, and the layout with it and with all changes before it.
    """
    shape = config.layout
    now = Layout(shape.tensor, shape.pipeline, config.memory.recompute, config.data.micro_batch)
    for mode in RECOMPUTE[RECOMPUTE.index(now.recompute) + 1 :]:
        now = replace(now, recompute=mode)
        yield f"--memory.recompute {mode}", now
    while now.micro_batch > 1:
        now = replace(now, micro_batch=now.micro_batch // 2)
        yield f"and --data.micro_batch {now.micro_batch}", now
    for tensor in (2, 4, 8):
        if tensor > now.tensor:
            now = replace(now, tensor=tensor)
            yield f"and --layout.tensor {tensor} --layout.sequence true", now
            break


def advise(config: RunConfig, processes: int, limit: float) -> dict[str, Any]:
    """Count the run and its changes, until one of them fits.

    Args:
        config: the run.
        processes: how many it has.
        limit: bytes of a device.

    Returns:
        `now`, bytes by kind at the peak of the fullest rank, and `changes`, a list of what to say
        and the bytes at that peak then.
    """
    from pretrain.planning.estimate import count_fullest

    found: dict[str, Any] = {"now": dict(count_fullest(config, processes).memory), "changes": []}
    for words, layout in steps_down(config):
        try:
            changed = with_layout(config, layout, processes)
        except ConfigError:
            continue
        size = sum(count_fullest(changed, processes).memory.values())
        found["changes"].append([words, size])
        if size + RESERVE <= limit:
            break
    return found


def ask(config: RunConfig, processes: int, limit: float) -> dict[str, Any] | None:
    """What `advise` says, from a process of its own; None where it cannot say anything in time.

    Args:
        config: the run.
        processes: how many it has.
        limit: bytes of a device.
    """
    if config.engine.name != "megatron":
        return None
    question = {"config": config.model_dump(mode="json"), "processes": processes, "bytes": limit}
    place = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in place}
    try:
        answer = subprocess.run(
            [sys.executable, "-m", "pretrain.planning.advice"],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env=environment,
            check=True,
        )
        return json.loads(answer.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def text(found: dict[str, Any] | None, processes: int, limit: float) -> str:
    """The advice in words, for the end of an error message.

    Args:
        found: what `advise` said, or None.
        processes: how many the run has.
        limit: bytes of a device.
    """
    plan = f"python -m pretrain plan RUN_FILE --gpus {processes} tries all layouts"
    if found is None:
        return (
            "change first, in this order: a higher --memory.recompute (selective, cells, full), a "
            f"smaller --data.micro_batch, a larger --layout.tensor or --layout.pipeline; {plan}"
        )
    kinds = sorted(found["now"].items(), key=lambda item: -item[1])
    told = ", ".join(f"{kind} {_gb(size)}" for kind, size in kinds if size >= 0.01 * kinds[0][1])
    lines = [
        f"by the plan's count the fullest rank has {_gb(sum(found['now'].values()))} at its peak, "
        f"and a device of {_gb(limit)} has room for {_gb(max(0.0, limit - RESERVE))}: {told}",
        "change first:" if found["changes"] else "",
    ]
    for words, size in found["changes"]:
        fits = ", which fits" if size + RESERVE <= limit else ""
        lines.append(f"  {words}: {_gb(size)}{fits}")
    return "\n".join(filter(None, [*lines, plan]))


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _main() -> None:
    """Answer one question from stdin; what rehearsals print goes nowhere."""
    question = json.load(sys.stdin)
    answer, sys.stdout = sys.stdout, sys.stderr
    from xlstm_mcore.megatron.first_import import import_megatron

    import_megatron()
    config = config_from_dict(question["config"])
    print(json.dumps(advise(config, question["processes"], question["bytes"])), file=answer)


if __name__ == "__main__":
    _main()
