"""The summary of a run, in words for a person: `python -m pretrain report RUN`.

Reads what the run left (config.yaml, metrics.jsonl, summary.json, history.jsonl), draws the loss
curve and a page (report.html), and writes the same text to summary.txt. Works for an unfinished run
too, from its metrics.

The loss is compared with n-gram models of the same tokens. A bigram model with add-one smoothing
knows which token follows which. A language model that is not clearly better has not learnt to use
more context, so the goal is 0.3 nat below the bigram model.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.config import RunConfig
from pretrain.lr_curve import Curve, continued
from pretrain.report.figures import draw_loss
from pretrain.report.page import write_page
from pretrain.report.runs import RunRecord, read_json, read_run
from pretrain.run_folder import CONFIG_FILE, METRICS_FILE, TENSORBOARD_DIR, checkpoints_of
from xlstm_io.checkpoint.choose import BEST, choose
from xlstm_io.checkpoint.evaluation import read_evaluation
from xlstm_io.checkpoint.manifest import read_manifest
from xlstm_io.errors import CheckpointError, ConfigError, ExitCode, UserError
from xlstm_io.storage import Location
from xlstm_io.terminal import size_of_model

GOAL_NATS = 0.3
BASELINE_NAMES = {
    "unigram": "unigram",
    "bigram_add_one": "bigram, add-one",
    "bigram_kneser_ney": "bigram, Kneser-Ney",
}
BASELINES_FILE = "baselines.json"
PLOT_FILE = "loss.png"
PAGE_FILE = "report.html"
COMPARISON_FILE = "comparison.html"
TEXT_FILE = "summary.txt"
SAMPLE_FILE = "sample.txt"
EXPORT_DIR = "hf"


def read_baselines(path: str | os.PathLike) -> dict[str, float]:
    """The n-gram losses in nats per token that `data_prep baselines` wrote, by short name."""
    content = read_json(Path(path), "python -m data_prep baselines")
    found = {
        name: float(content[name])
        for name in BASELINE_NAMES
        if isinstance(content.get(name), int | float)
    }
    if not found:
        raise UserError(
            f"{path} has none of {', '.join(BASELINE_NAMES)}; make it again with "
            "python -m data_prep baselines"
        )
    return found


def _loss_lines(
    valid_loss: float | None, baselines: Mapping[str, float], margin: float | None
) -> list[str]:
    """The validation loss among the baselines, best last, and the verdict."""
    if valid_loss is None:
        return ["validation loss     none yet: no evaluation has run"]
    rows = [(value, BASELINE_NAMES[name]) for name, value in baselines.items()]
    rows.append((valid_loss, "this model"))
    lines = ["validation loss, nats per token of held-out documents:"]
    lines += [
        f"  {'->' if name == 'this model' else '  '} {name:<20} {value:6.3f}"
        for value, name in sorted(rows, reverse=True)
    ]
    if margin is None:
        return [
            *lines,
            "  (no baselines given: `python -m data_prep baselines SHARDS` writes n-gram losses, "
            "--baselines FILE compares)",
        ]
    verdict = "met" if margin >= GOAL_NATS else "NOT met"
    side = "below" if margin >= 0 else "above"
    lines.append(
        f"goal {verdict}: {abs(margin):.3f} nat {side} the add-one bigram "
        f"(wanted: {GOAL_NATS} below)"
    )
    return lines


def _memory_line(peak: Any) -> str | None:
    """Peak memory from summary.json: {"sum": bytes, "max": bytes} over the processes."""
    if not isinstance(peak, Mapping):
        return None
    total, largest = (peak[key] / 2**30 for key in ("sum", "max"))
    return f"peak memory         {total:.2f} GiB over all processes, {largest:.2f} GiB in one"


def _places(run: RunRecord) -> list[str]:
    """Those of the run's files that exist, and where they are; remote storage is not asked."""
    run_dir, checkpoints = run.folder, checkpoints_of(run.config, run.folder)

    def is_there(path: Location) -> bool:
        return not isinstance(path, Path) or path.exists()

    named = (
        ("configuration", run_dir / CONFIG_FILE),
        ("metrics", run_dir / METRICS_FILE),
        ("loss curve", run_dir / PLOT_FILE),
        ("page", run_dir / PAGE_FILE),
        ("TensorBoard", run_dir / TENSORBOARD_DIR),
        ("checkpoints", checkpoints),
        ("Hugging Face", run_dir / EXPORT_DIR),
        ("sample text", run_dir / SAMPLE_FILE),
        ("this summary", run_dir / TEXT_FILE),
    )
    lines = [f"  {name:<17} {path}" for name, path in named if is_there(path)]
    best = _best_checkpoint(checkpoints) if isinstance(checkpoints, Path) else None
    if best is not None:
        path, loss = best
        lines.append(f"  {'best checkpoint':<17} {path} (validation loss {loss:.3f})")
    return lines


def _best_checkpoint(folder: Path) -> tuple[Location, float] | None:
    """The checkpoint with the lowest validation loss of its own, and that loss."""
    try:
        path = choose(folder, BEST)
    except CheckpointError:  # there is none, or none was measured
        return None
    measured = read_evaluation(path, read_manifest(path))
    assert measured is not None
    return path, measured.loss


def program(name: str) -> str:
    """How to call one of this environment's programs from here, activated or not.

    `python` where the shell finds it, `.venv/bin/python` where it would not.
    """
    folder = Path(sys.executable).parent
    found = shutil.which(name)
    if found is not None and Path(found).parent == folder:
        return name
    path, here = folder / name, Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _next_steps(
    run_dir: Path, config: RunConfig, finished: bool, margin: float | None
) -> list[str]:
    """What a person may want to do now; `margin` is None where there is nothing to compare."""
    config_path = run_dir / CONFIG_FILE
    steps = config.run.steps if not finished else 2 * config.run.steps
    ours = f"{program('python')} -m pretrain"
    words, note = _longer(config, steps) if finished else ("", None)
    lines = [
        f"  {'train longer' if finished else 'go on':<17} "
        f"{ours} launch {config_path} --run.steps {steps}{words}",
        *([f"  {'':<17} {note}"] if note else []),
        f"  {'write more text':<17} {ours} generate {run_dir} --max-tokens 300",
        f"  {'see the curves':<17} {program('tensorboard')} --logdir {run_dir / TENSORBOARD_DIR}",
        f"  {'a paper size':<17} {ours} check pretrain/configs/xlstm_125m_7to1.yaml --no-data",
    ]
    if finished and margin is not None and margin < GOAL_NATS:
        lines.insert(0, "  the goal takes a few hundred steps, even with the smallest models")
    return lines


def _longer(config: RunConfig, steps: int) -> tuple[str, str]:
    """What a longer run needs besides its steps, and what its learning rate will do."""
    options, before = config.schedule, config.run.steps
    extended = {"done": before, "before": before, "steps": steps}
    curve, optimizer = Curve(before), config.optimizer
    try:
        return "", continued(curve, optimizer, options, **extended)[1]
    except ConfigError:  # the curve ends at a rate of 0
        anew = options.model_copy(update={"extend": "recompute"})
        return " --schedule.extend recompute", continued(curve, optimizer, anew, **extended)[1]


def build_report(run: RunRecord, baselines: Mapping[str, float]) -> str:
    """The text of the summary.

    Args:
        run: what the run left.
        baselines: n-gram losses by short name.
    """
    config, summary, folder = run.config, run.summary, run.folder
    valid_loss = summary.get("valid_loss")
    reference = baselines.get("bigram_add_one")
    margin = None if valid_loss is None or reference is None else reference - valid_loss
    state = "finished" if summary["finished"] else "not finished"
    data = config.data
    tokens = summary.get("tokens", data.ramp.samples(summary["steps"]) * data.seq_len)
    lines = [
        f"run {folder}: {state}, {summary['steps']:,} of {config.run.steps:,} steps",
        f"model               {size_of_model(summary['parameters'])} parameters, "
        f"pattern {config.model.pattern}",
        f"trained on          {tokens:,} tokens",
        "",
        *_loss_lines(valid_loss, baselines, margin),
        "",
    ]
    if summary.get("tokens_per_second"):
        lines.append(f"speed               {summary['tokens_per_second']:,.0f} tokens/s")
    if summary.get("seconds"):
        lines.append(f"training time       {summary['seconds']:,.0f} s")
    memory = _memory_line(summary.get("peak_memory_bytes"))
    if memory:
        lines.append(memory)
    lines += ["", "where things lie:", *_places(run)]
    lines += ["", "what to try next:"]
    lines += _next_steps(folder, config, summary["finished"], margin)
    return "\n".join(lines)


def main(run_dirs: Sequence[str | os.PathLike], baselines: str | os.PathLike | None = None) -> int:
    """Print the summary of a run, write it and an HTML page beside the run; returns the exit code.

    Of several runs the first gets the text and a page that compares them all.

    Args:
        run_dirs: the runs' folders.
        baselines: JSON of n-gram losses; a copy stays in the first run's folder and is used the
            next time.

    Raises:
        UserError: a folder does not hold a run, or the baselines cannot be read.
    """
    folder = Path(run_dirs[0])
    kept = folder / BASELINES_FILE
    values: dict[str, float] = {}
    if baselines is not None:
        values = read_baselines(baselines)
    elif kept.exists():
        values = read_baselines(kept)
    shown = {BASELINE_NAMES[name]: value for name, value in values.items()}
    first, *others = [read_run(Path(one), shown) for one in run_dirs]
    if baselines is not None:
        kept.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if first.points("loss")[0]:
        draw_loss(first, folder / PLOT_FILE)
    page = folder / (COMPARISON_FILE if others else PAGE_FILE)
    page.write_text(write_page([first, *others]), encoding="utf-8")
    (folder / TEXT_FILE).touch()  # so that the list of places has it
    text = build_report(first, values)
    (folder / TEXT_FILE).write_text(text + "\n", encoding="utf-8")
    print(text)
    if others:
        print(f"\ncompared with {', '.join(str(run.folder) for run in others)}: {page}")
    return ExitCode.DONE
