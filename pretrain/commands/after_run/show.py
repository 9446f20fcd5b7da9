"""What a checkpoint contains, as text for a person."""

import datetime
import math

from xlstm_io.checkpoint.choose import choose
from xlstm_io.checkpoint.evaluation import Evaluation, read_evaluation
from xlstm_io.checkpoint.manifest import is_weight, read_manifest
from xlstm_io.storage import Location
from xlstm_io.terminal import counted


def show(path: Location | str, which: str | None = None) -> str:
    """What a checkpoint contains, as text.

    Args:
        path: a checkpoint, or a run folder.
        which: which checkpoint of a run; see `xlstm_io.checkpoint.choose`.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = choose(path, which)
    manifest = read_manifest(path)
    state, config = manifest.state, manifest.config
    weights = {n: t for n, t in manifest.tensors.items() if is_weight(n)}
    parameters = sum(math.prod(t.shape) for t in weights.values())
    size = sum(f.size for f in manifest.files.values())
    created = datetime.datetime.fromtimestamp(manifest.created).astimezone()
    imported = state.get("imported") or {}
    facts = {
        "checkpoint": str(path),
        "imported": f"from {imported.get('from')} as {imported.get('family')}" if imported else "",
        "saved": created.isoformat(" ", "seconds"),
        "step": f"{manifest.step:,}",
        "tokens": f"{state['tokens']:,}" if "tokens" in state else "not recorded",
        "valid loss": _valid_loss(read_evaluation(path, manifest)),
        "data": f"{state.get('cursor', {}).get('consumed_samples', 0):,} samples consumed",
        "model": _words(config, "model", "pattern", "hidden_size", "num_heads", "vocab_size"),
        "written on": " ".join(
            (
                _words(config, "engine", "name", "zero_stage", "precision"),
                _words(config, "layout", "tensor", "pipeline", "virtual", "context"),
            )
        ),
        "parameters": f"{parameters:,} in {counted(len(weights), 'tensor')}",
        "optimizer": f"{len(manifest.tensors) - len(weights)} tensors",
        "size": f"{size / 1e6:,.1f} MB in {counted(len(manifest.files), 'file')}",
        "written by": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    lines = [f"{label:<12}{value}" for label, value in facts.items() if value.strip()]
    lines.append("weights")
    lines += [
        f"  {name:<56} {str(info.dtype).removeprefix('torch.'):<9} {list(info.shape)}"
        for name, info in sorted(weights.items(), key=lambda item: _natural(item[0]))
    ]
    return "\n".join(lines)


def _valid_loss(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "not measured at this step"
    each = ", ".join(f"{name} {loss:.4f}" for name, loss in evaluation.sets.items())
    return f"{evaluation.loss:.4f}{f' ({each})' if len(evaluation.sets) > 1 else ''}"


def _words(config: dict, section: str, *keys: str) -> str:
    values = config.get(section, {})
    return " ".join(f"{key}={values[key]}" for key in keys if values.get(key) is not None)


def _natural(name: str) -> list:
    """Sort key that puts layer 10 after layer 9."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]
