"""The validation loss of a checkpoint, in a file of its own beside the manifest.

A run saves first and evaluates afterwards, so that nothing is lost when it ends in an evaluation.
The manifest is complete by then and never changes. What is measured goes into `evaluation.json`:

    {"manifest": "<checksum of the manifest>", "step": 200, "valid_loss": 4.6, "sets": {"web": 4.6}}

The checksum ties the file to the weights that were measured. A file that names another manifest, or
that is damaged, counts as none, and the evaluation is done again.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xlstm_io.checkpoint.manifest import Manifest, parse_manifest
from xlstm_io.foreign.json_file import parse_json
from xlstm_io.storage import Location, read_file, write_atomic

EVALUATION_NAME = "evaluation.json"
_LIMIT = 1 << 20  # bytes


@dataclass(frozen=True)
class Evaluation:
    """What was measured at a step.

    Attributes:
        step: finished steps.
        loss: nats per token over all validation sets, each with the weight of its tokens; nan if it
            is not finite.
        sets: the loss of each validation set, by name.
    """

    step: int
    loss: float
    sets: Mapping[str, float] = field(default_factory=dict)


def write_evaluation(path: Location, evaluation: Evaluation) -> None:
    """Write `evaluation.json` into a complete checkpoint of the same step.

    Raises:
        CheckpointError: there is no sound manifest.
        OSError: the file system refuses.
    """
    manifest = parse_manifest(path, check_files=False)
    assert manifest.step == evaluation.step, (path, evaluation)
    body = {
        "manifest": manifest.checksum,
        "step": evaluation.step,
        "valid_loss": _to_json(evaluation.loss),
        "sets": {name: _to_json(loss) for name, loss in evaluation.sets.items()},
    }
    data = json.dumps(body, indent=1, allow_nan=False).encode() + b"\n"
    write_atomic(path / EVALUATION_NAME, data, make_parents=False)


def read_evaluation(path: Location, manifest: Manifest) -> Evaluation | None:
    """What was measured of a checkpoint; None if nothing was.

    Versions up to 0.1.0 evaluated before they saved, and the loss is in the state of the manifest.

    Args:
        path: the checkpoint's folder.
        manifest: its manifest.

    Raises:
        OSError: the file system refuses.
    """
    try:
        body = parse_json(read_file(path / EVALUATION_NAME, _LIMIT))
        if body["manifest"] != manifest.checksum or body["step"] != manifest.step:
            return None
        sets = {str(name): _from_json(loss) for name, loss in body["sets"].items()}
        return Evaluation(manifest.step, _from_json(body["valid_loss"]), sets)
    except FileNotFoundError:
        loss, step = manifest.state.get("valid_loss"), manifest.state.get("valid_step")
        return None if loss is None or step != manifest.step else Evaluation(step, float(loss))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def _to_json(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _from_json(loss: Any) -> float:
    return math.nan if loss is None else float(loss)
