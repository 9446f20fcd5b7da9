"""The names of what a run keeps in its folder, `run.dir`, beside its checkpoints."""

from pathlib import Path

from pretrain.config import RunConfig
from xlstm_io.checkpoint.lives import CHECKPOINTS_FOLDER
from xlstm_io.storage import Location, location

CELLS_FILE = "cells.jsonl"
CONFIG_FILE = "config.yaml"
EVIDENCE_FOLDER = "evidence"
HISTORY_FILE = "history.jsonl"
LOGS_FOLDER = "logs"
METRICS_FILE = "metrics.jsonl"
PROFILE_FOLDER = "profile"
PROVENANCE_FILE = "provenance.json"
SAMPLES_FILE = "samples.jsonl"
STARTS_FOLDER = "starts"
SUMMARY_FILE = "summary.json"
TENSORBOARD_DIR = "tensorboard"
WANDB_ID_FILE = "wandb-id.txt"


def checkpoints_of(config: RunConfig, folder: Path | None = None) -> Location:
    """The folder of a run's checkpoints.

    Args:
        config: the run.
        folder: where its folder is now, if not at `run.dir`.
    """
    folder = folder or Path(config.run.dir)
    return location(config.checkpoint.dir or folder / CHECKPOINTS_FOLDER)


def life_logs(folder: Path, life: int) -> Path:
    """Where the output of the ranks of a life goes, `rank_0.log` and so on.

    Args:
        folder: the run folder.
        life: its number; every start of the run has one, and so a folder of its own.
    """
    return folder / LOGS_FOLDER / f"life-{life:06d}"
