"""Where the numbers of a run go beside metrics.jsonl: TensorBoard, and Weights & Biases."""

import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pretrain.config import RunConfig
from pretrain.run_folder import TENSORBOARD_DIR, WANDB_ID_FILE
from xlstm_io.storage import absolute

log = logging.getLogger(__name__)


class MetricWriter(Protocol):
    """Takes the numbers of logged steps."""

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Take what was measured after `step` finished steps."""

    def close(self) -> None:
        """Finish what was written."""


class TensorBoardWriter:
    """Events for TensorBoard.

    Args:
        folder: the run's folder.
        start_step: finished steps this process starts from; what an earlier process wrote beyond
            them is not shown any more.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(folder / TENSORBOARD_DIR), purge_step=start_step + 1 if start_step else None
        )

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Write and flush one event per value."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, global_step=step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file of events."""
        self._writer.close()


class WandbWriter:
    """A run of Weights & Biases; all lives of a run folder are one run there.

    Its identity is kept in the run's folder. Steps are a value of their own there, `step`, and the
    axis of all others: W&B's own counter cannot go back to a checkpoint. Whatever goes wrong with
    W&B is a warning, and training goes on without it.

    Args:
        config: the run.
    """

    def __init__(self, config: RunConfig) -> None:
        options, folder = config.logging.wandb, Path(config.run.dir)
        self._run: Any = None
        try:
            import wandb

            self._run = wandb.init(
                project=options.project,
                entity=options.entity,
                name=options.name or absolute(folder).name,
                id=_identity(folder),
                resume="allow",
                dir=str(folder),
                mode=options.mode,
                config=config.model_dump(mode="json"),
                # It would also take over stdout, and record the source code of the folder.
                settings=wandb.Settings(console="off", save_code=False, silent=True),
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            self._give_up(error)

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Send the values; W&B's process does so in the background."""
        if self._run is None:
            return
        try:
            self._run.log({"step": step, **values})
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Wait until everything is sent or written."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        log.warning("nothing more is sent to Weights & Biases: %s", error)


def open_writers(config: RunConfig, start_step: int) -> list[MetricWriter]:
    """The writers that a run asks for; for the one rank that writes.

    Args:
        config: the run.
        start_step: finished steps this process starts from.
    """
    writers: list[MetricWriter] = []
    if config.logging.tensorboard:
        writers.append(TensorBoardWriter(Path(config.run.dir), start_step))
    if config.logging.wandb.project is not None:
        writers.append(WandbWriter(config))
    return writers


def _identity(folder: Path) -> str:
    """The W&B identity of the run in a folder, made at its first start."""
    path = folder / WANDB_ID_FILE
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
