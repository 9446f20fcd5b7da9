"""Does a run that stops and resumes here equal one that does not, bit for bit?

    python -m pretrain self-test run.yaml --nproc 2
    srun ... python -m pretrain self-test run.yaml

trains a few steps of the run twice, on its own data, layout and storage: once without a stop; once
until half of them, with a checkpoint there, a new engine and loader that load it, and the rest.
Losses, gradient norms and every byte of both final checkpoints must be the same. What differs on a
cluster is named: storage that loses writes, or kernels and collectives that do not repeat
themselves (docs/checkpoints.md lists the flags against that).
"""

import gc
import os
import secrets
import shutil
from pathlib import Path

from pretrain import layout as layouts
from pretrain.checkpoint import CheckpointError, find_latest, read_manifest
from pretrain.checkpoint.ranks import background_ranks
from pretrain.config import RunConfig
from pretrain.layout import Layout
from pretrain.run_folder import METRICS_FILE, checkpoints_of
from pretrain.trainer import Trainer
from pretrain.watching.metrics import read_metrics
from xlstm_io.checkpoint.reader import CheckpointReader
from xlstm_io.errors import ConfigError, ExitCode
from xlstm_io.signals import StopSignal
from xlstm_io.storage import Location, is_folder, remove_folder

COMPARED = ("loss", "grad_norm", "lr", "tokens")
NEVER = 1 << 40  # an interval that no run reaches


def main(config: RunConfig, steps: int) -> int:
    """Run the test with this process as one of the workers.

    Args:
        config: the run to test; its schedule and data are used, its folder gets a subfolder that is
            removed after a success.
        steps: steps to train; the stop is after half of them.

    Returns:
        0 when both runs are the same.

    Raises:
        UserError: the run cannot start, or the two runs differ; the message shows where.
    """
    if not 2 <= steps < config.run.steps:
        raise ConfigError(
            f"--steps={steps} must be at least 2 and less than run.steps={config.run.steps}"
        )
    with StopSignal(announce=int(os.environ.get("RANK", "0")) == 0) as stop:
        layout = layouts.start(config, stop)
        code = _test(config, steps, layout, stop)
        layout.close()  # not after an error: another rank may be gone, and this would wait for it
        return code


def _test(config: RunConfig, steps: int, layout: Layout, stop: StopSignal) -> int:
    ranks = background_ranks()
    name = f"self-test-{ranks.broadcast(secrets.token_hex(4))}"
    runs = {kind: _part(config, name, kind) for kind in ("straight", "resumed")}
    for kind, until in (("straight", steps), ("resumed", steps // 2), ("resumed", steps)):
        trainer = Trainer(runs[kind], layout, stop)
        trainer.train(until)
        reached = trainer.state.step
        trainer.engine.close()  # its memory is needed for the next one
        del trainer
        gc.collect()
        if stop.requested or reached != until:
            raise ConfigError(f"stopped at step {reached}, before the test was over")
    folders = {kind: checkpoints_of(part) for kind, part in runs.items()}
    kept = f"; see {Path(config.run.dir) / name}"
    text = ranks.first("self-test", lambda: _compare(runs, folders, steps), kept)
    if layout.is_main:
        print(text, flush=True)
        shutil.rmtree(Path(config.run.dir) / name)
        for folder in folders.values():
            if is_folder(folder):  # on remote storage
                remove_folder(folder)
    return ExitCode.DONE


def _part(config: RunConfig, name: str, kind: str) -> RunConfig:
    """The run in a folder of its own, every step logged there alone, and no saves but ours."""
    raw = config.model_dump()
    raw["run"]["dir"] = str(Path(config.run.dir) / name / kind)
    raw["checkpoint"] |= {"interval": NEVER, "keep": 1, "keep_every": None, "keep_best": 0}
    if config.checkpoint.dir is not None:
        raw["checkpoint"]["dir"] = f"{config.checkpoint.dir.rstrip('/')}/{name}-{kind}"
    raw["evaluation"]["interval"] = NEVER
    raw["logging"] |= {"interval": 1, "tensorboard": False, "wandb": {}}
    return RunConfig.model_validate(raw)


def _compare(runs: dict[str, RunConfig], folders: dict[str, Location], steps: int) -> str:
    """The verdict as text; CheckpointError if the runs differ."""
    logs = {
        kind: {r["step"]: r for r in read_metrics(Path(part.run.dir) / METRICS_FILE)}
        for kind, part in runs.items()
    }
    differing = []
    lines = [f"{'step':>6}  {'loss':>22}  {'gradient norm':>22}"]
    for step in range(1, steps + 1):
        a, b = logs["straight"][step], logs["resumed"][step]
        for key in COMPARED:
            if a[key] != b[key]:
                differing.append(f"step {step}: {key} {a[key]!r}, resumed {b[key]!r}")
        mark = "  <- resumed" if step == steps // 2 + 1 else ""
        lines.append(f"{step:>6}  {b['loss']!r:>22}  {b['grad_norm']!r:>22}{mark}")
    paths = {kind: find_latest(folder) for kind, folder in folders.items()}
    hashes = {kind: _hashes(path) for kind, path in paths.items()}
    names = sorted({name for name, _ in hashes["straight"].items() ^ hashes["resumed"].items()})
    if names:
        few = ", ".join(names[:3])
        differing.append(f"{len(names)} of {len(hashes['straight'])} tensors, such as {few}")
    if differing:
        raise CheckpointError(
            "the resumed run differs from the one without a stop; if this is a GPU, set "
            "run.deterministic=true and see docs/checkpoints.md:\n  " + "\n  ".join(differing)
        )
    size = sum(f.size for f in read_manifest(paths["resumed"]).files.values())
    stalls = [r.get("checkpoint_stall_seconds", 0.0) for r in logs["resumed"].values()]
    lines.append(
        f"resume self-test passed: {steps} steps and {len(hashes['straight'])} tensors are the "
        f"same bit for bit; checkpoints of {size / 1e6:,.1f} MB stopped training for "
        f"{max(stalls):.3f} s"
    )
    return "\n".join(lines)


def _hashes(path: Location) -> dict[str, tuple]:
    """Name of each tensor -> places and hashes of its stored slices."""
    with CheckpointReader(path) as reader:
        return {
            name: tuple(sorted((part.offset, part.shape, part.xxh3) for part in stored))
            for name, stored in reader.stored.items()
        }
