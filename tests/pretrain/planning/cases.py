"""Plans and what they are compared with: run by the tests beside it, in a process of its own."""

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

from pretrain import cli
from pretrain.commands.before_run.plan import plan
from pretrain.config import LayoutConfig, load_config, save_config
from pretrain.planning.estimate import DATA, TENSOR, _sent, count_rank
from pretrain.rehearsal import device as rehearsed
from pretrain.rehearsal.gpus import RESERVE, Gpu
from pretrain.rehearsal.rank import rehearse_rank
from tests.dist import work
from xlstm_mcore.megatron.first_import import import_megatron

CASES = (
    ("MMMMM", {"data__seq_len": 128}),
    ("MsMsMsMs", {"memory__recompute": "selective"}),
    ("MMMM|MMMM", {"layout": {"tensor": 2, "sequence": True, "pipeline": 2}}),
    ("MMMM|MMM|MMMM|MMM", {"layout": {"pipeline": 2, "virtual": 2}}),
)


def run_of(pattern, layout=None, **changes):
    options = {"data__global_batch": 8, "engine__precision": "bf16", **changes}
    config = work.run_config("large", **options)
    model = config.model.model_copy(update={"pattern": pattern})
    return config.model_copy(update={"model": model, "layout": LayoutConfig(**layout or {})})


def counted() -> list:
    found = []
    for pattern, changes in CASES:
        config = run_of(pattern, **changes)
        pipeline = config.layout.pipeline
        for place in range(pipeline):
            counts = count_rank(config, place, 8)
            whole = rehearse_rank(config, place * 8 // pipeline, 8, steps_only=True)
            sent = _sent(whole)
            found.append(
                {
                    "pattern": pattern,
                    "memory": [sum(counts.memory.values()), whole.memory.peak],
                    "sent": [[counts.sent.get(k, 0.0), sent.get(k, 0.0)] for k in (TENSOR, DATA)],
                }
            )
    return found


def planned(memory: int) -> list:
    gpu = Gpu("small", memory, 100.0, 1000.0, 100.0, 10.0, 100, 160_000)
    config = run_of("MM", data__seq_len=64)
    return [
        [str(one.layout), one.why_not, one.estimate and one.estimate.tokens_per_second]
        for one in plan(config, 4, gpu, jobs=1)
    ]


def command() -> dict:
    """The command itself, which writes the best layout's run file."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        run_file, written = Path(folder, "run.yaml"), Path(folder, "planned.yaml")
        save_config(run_of("M", data__seq_len=64), run_file)
        words = ["plan", str(run_file), "--gpus", "4", "--write", str(written)]
        with mock.patch.object(os, "sched_getaffinity", lambda _: {0}):  # in this process
            code = cli.run(words)
        return {"code": code, "text": out.getvalue(), "written": load_config(written).model_dump()}


if __name__ == "__main__":
    import_megatron()
    rehearsed.device()
    json.dump(
        {
            "counted": counted(),
            "fits": planned(10**11),
            "nothing": planned(RESERVE + 1000),
            "command": command(),
        },
        sys.stdout,
    )
