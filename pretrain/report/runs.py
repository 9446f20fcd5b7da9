"""What one run left in its folder, read for a report."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.config import RunConfig, load_config
from pretrain.evaluation.sample_file import Sample, read_samples
from pretrain.run_folder import (
    CELLS_FILE,
    CONFIG_FILE,
    METRICS_FILE,
    PROVENANCE_FILE,
    STARTS_FOLDER,
    SUMMARY_FILE,
)
from pretrain.watching.history import read_history
from pretrain.watching.metrics import read_metrics
from xlstm_io.errors import UserError
from xlstm_mcore.sizes.parameters import count_parameters


@dataclass(frozen=True)
class RunRecord:
    """One run, finished or not.

    Attributes:
        folder: its folder.
        config: its newest configuration.
        records: its metrics, in order.
        summary: `summary.json`, or what the metrics say of an unfinished run; see `read_summary`.
        history: its starts and events, in order.
        baselines: n-gram losses in nats per token, by the name they are shown with.
        samples: how its newest evaluation continued `evaluation.prompts`.
        provenance: code, versions, machine, command and data of its newest start.
        cells: its looks into the layers, in order; see `pretrain.watching.cells`.
    """

    folder: Path
    config: RunConfig
    records: list[dict[str, Any]]
    summary: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    baselines: Mapping[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    cells: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def points(self, key: str, by: str = "step") -> tuple[list[float], list[float]]:
        """Where `key` was recorded, by `step` or `tokens`, and what it was."""
        found = [r for r in self.records if r.get(key) is not None and r.get(by) is not None]
        return [r[by] for r in found], [r[key] for r in found]

    @property
    def valid_keys(self) -> list[str]:
        """The validation losses that were recorded: their mean, and each set where there are more.

        A record names a set `valid_loss/NAME`.
        """
        return [
            *(["valid_loss"] if self.points("valid_loss")[0] else []),
            *self.keys_under("valid_loss"),
        ]

    def keys_under(self, name: str) -> list[str]:
        """The recorded keys `name/...`, in the order in which they first came."""
        keys = {key: None for record in self.records for key in record}
        return [key for key in keys if key.startswith(f"{name}/")]


def read_run(folder: Path, baselines: Mapping[str, float] | None = None) -> RunRecord:
    """Read a run folder.

    Args:
        folder: the run's folder.
        baselines: n-gram losses by the name they are shown with.

    Raises:
        UserError: the folder does not hold a run, or a file in it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the run.dir of a run")
    config_path, metrics_path = folder / CONFIG_FILE, folder / METRICS_FILE
    cells_path = folder / CELLS_FILE
    if not config_path.exists():
        raise UserError(
            f"{folder} has no {CONFIG_FILE}, so it is not a run folder; give the run.dir of a run"
        )
    config = load_config(config_path)
    records = read_metrics(metrics_path) if metrics_path.exists() else []
    return RunRecord(
        folder=folder,
        config=config,
        records=records,
        summary=read_summary(folder, config, records),
        history=read_history(folder),
        baselines=baselines or {},
        provenance=_provenance(folder),
        cells=read_metrics(cells_path) if cells_path.exists() else [],
        samples=read_samples(folder),
    )


def _provenance(folder: Path) -> dict[str, Any]:
    """What the newest start of a run recorded of itself; empty for runs of version 0.1.0."""
    found = sorted(folder.glob(f"{STARTS_FOLDER}/*/{PROVENANCE_FILE}"))
    return read_json(found[-1], "starting the run") if found else {}


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: the file.
        made_by: what makes it, for the message.

    Raises:
        UserError: it is missing or something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; it is made by {made_by}") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}); make it again with {made_by}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; make it again with {made_by}")
    return content


def read_summary(folder: Path, config: RunConfig, records: list[dict[str, Any]]) -> dict[str, Any]:
    """summary.json with `finished`, or what the metrics say about a run that has not finished.

    Args:
        folder: the run's folder.
        config: its configuration.
        records: its metrics.

    Raises:
        UserError: summary.json is not a JSON object.
    """
    path = folder / SUMMARY_FILE
    last_step = records[-1]["step"] if records else 0
    if path.exists():
        summary = read_json(path, "training to the end")
        if summary.get("steps", 0) >= last_step:
            return summary | {"finished": summary.get("steps", 0) >= config.run.steps}
    summary: dict[str, Any] = {
        "finished": False,
        "steps": last_step,
        "parameters": count_parameters(config.model)["total"],
    }
    for record in records:  # later records win
        for key in ("valid_loss", "tokens_per_second", "tokens"):
            if record.get(key) is not None:
                summary[key] = record[key]
    return summary
