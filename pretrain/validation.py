"""The validation loss of a run while it trains."""

import logging
from collections.abc import Callable, Iterable, Iterator

from pretrain.config import RunConfig
from pretrain.data import Batch, DataPlan, ValidLoader, open_valid
from pretrain.engines.base import Engine, mean_of
from pretrain.layout import Layout
from pretrain.supervision.watchdog import EVALUATION, Watchdog
from xlstm_io.checkpoint.evaluation import Evaluation
from xlstm_io.signals import StopSignal

log = logging.getLogger(__name__)


class Validation:
    """Measures the loss on every validation set; the same on all ranks.

    Args:
        config: the run.
        layout: where this process stands.
        data: the order of the run's data.

    Raises:
        UserError: a validation set cannot be opened.
    """

    def __init__(self, config: RunConfig, layout: Layout, data: DataPlan) -> None:
        self._config, self._layout = config, layout
        limit = config.evaluation.max_batches
        # In rows: the batches of a layout may have more places than a global batch has rows.
        max_rows = None if limit is None else limit * config.data.global_batch
        sets = open_valid(config.data, data, check_files=layout.is_main)
        self._sets = {
            name: ValidLoader(
                dataset,
                micro_batch=config.data.micro_batch,
                dp_rank=layout.dp_rank,
                dp_size=layout.dp_size,
                max_rows=max_rows,
            )
            for name, dataset in sets.items()
        }

    def due(self, step: int) -> bool:
        """Whether the loss is to be measured when `step` steps are finished."""
        config = self._config
        return step == config.run.steps or (step > 0 and step % config.evaluation.interval == 0)

    def measure(
        self,
        engine: Engine,
        step: int,
        stop: StopSignal,
        watchdog: Watchdog,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Evaluation | None:
        """Measure the loss at a step; called by all ranks.

        Args:
            engine: holds the model.
            step: finished steps.
            stop: the request to stop, read before every batch. All ranks leave together at the
                batch before which one of them has heard it.
            watchdog: is told at every batch.
            progress: is told before every batch how many are done, and of how many, on this rank.

        Returns:
            What was measured, or None when a rank was asked to stop.
        """
        stopped, done = False, 0
        total = sum(map(len, self._sets.values()))

        def until_stopped(batches: Iterable[Batch]) -> Iterator[Batch]:
            nonlocal stopped, done
            for batch in batches:
                watchdog.moved(EVALUATION, step)
                stopped = self._layout.any(stop.requested)
                if stopped:
                    return
                progress(done, total)
                yield batch
                done += 1

        losses = {}
        for name, loader in self._sets.items():
            losses[name] = engine.evaluate(until_stopped(loader))
            if stopped:
                return None
        self._report_damage()
        each = {name: loss.mean for name, loss in losses.items()}
        return Evaluation(step, mean_of(losses.values()), each)

    def _report_damage(self) -> None:
        """Warn of the rows that the loss is without; called by all ranks."""
        if self._config.data.on_corrupt != "quarantine":
            return
        own = {
            (name, row): str(error)
            for name, loader in self._sets.items()
            for row, error in loader.damaged
        }
        # Ranks of one replica have met the same rows.
        damaged = {key: why for found in self._layout.gather(own) for key, why in found.items()}
        for name, loader in self._sets.items():
            rows = sorted(row for of, row in damaged if of == name)
            if rows and self._layout.is_main:
                log.warning(
                    "the validation loss%s is without %d of %d rows, which are damaged: %s",
                    f" of {name}" if name else "",
                    len(rows),
                    loader.num_rows,
                    damaged[name, rows[0]],
                )
