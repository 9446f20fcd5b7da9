"""One process of a run, from its command line to its exit code.

What a life of the run needs around the training loop is taken here, in this order: the request to
stop, the lease of the run folder, the watchdog, the other ranks.
"""

import os
from contextlib import nullcontext
from pathlib import Path

from pretrain import layout as layouts
from pretrain.checkpoint import Ranks
from pretrain.config import RunConfig
from pretrain.guard.kernel_check import check_kernels_once
from pretrain.run_folder import LOGS_FOLDER, checkpoints_of, life_logs
from pretrain.supervision.console import ConsoleLog
from pretrain.supervision.failures import machine_failure
from pretrain.supervision.lease import Lease, take_run
from pretrain.supervision.out_of_memory import out_of_memory
from pretrain.supervision.watchdog import Limits, Watchdog
from pretrain.trainer import Trainer
from xlstm_io.signals import StopSignal


def main(config: RunConfig, stop: StopSignal | None = None, *, take_over: bool = False) -> int:
    """Train as `config` says, from the newest complete checkpoint of its run folder.

    Called by every process of the run (see `pretrain.commands.run.launch`). Rank 0 takes the run's
    lease before it meets the others, so that a folder in use is refused at once.

    After an error the process groups are left as they are: another rank may be gone, and to destroy
    them would wait for it. `pretrain.cli.main` ends the process then.

    Args:
        config: the run.
        stop: the request to stop, heard since before this module was imported; None hears it from
            here on.
        take_over: take the lease from a life that may be at work.

    Returns:
        0 when the run is complete, 75 when it was asked to stop and has saved.

    Raises:
        UserError: bad configuration, data, checkpoint, or a diverged loss.
        Superseded: a newer life of the run has taken over.
        MachineFailed: another rank, a worker or a disk failed, or a kernel computes something else.
        Interrupted: the request to stop came before all ranks had.
    """
    rank = int(os.environ.get("RANK", "0"))
    first = rank == 0
    folder = Path(config.run.dir)
    with (
        nullcontext(stop) if stop else StopSignal(announce=first) as heard,
        _lease(config, take_over) if first else nullcontext() as taken,
        ConsoleLog(life_logs(folder, taken.life) / "rank_0.log")
        if isinstance(taken, Lease)
        else nullcontext(),
        Watchdog(folder / LOGS_FOLDER, rank, Limits.from_config(config.guard)) as watchdog,
    ):
        if config.run.max_minutes is not None:
            heard.end_after(60 * config.run.max_minutes)
        trainer = None
        try:
            layout = layouts.start(config, heard)
            _check_taken(taken, folder)
            check_kernels_once(config, layout.device)
            trainer = Trainer(config, layout, heard, taken, watchdog)
            code = trainer.train()
        except Exception as error:
            failure = out_of_memory(
                error,
                config,
                rank=rank,
                processes=int(os.environ.get("WORLD_SIZE", "1")),
                steps=0 if trainer is None else trainer.state.step - trainer.start.state.step,
                before=None if trainer is None else trainer.start.state.step,
                folder=folder / LOGS_FOLDER,
            ) or machine_failure(error, rank)
            if failure is None:
                raise
            raise failure from error
        layout.close()
        return code


def _lease(config: RunConfig, take_over: bool) -> Lease | nullcontext[OSError]:
    """The lease of a run, or why it cannot be taken: here the other ranks could not hear of it."""
    try:
        return take_run(Path(config.run.dir), checkpoints_of(config), take_over=take_over)
    except OSError as error:
        return nullcontext(error)


def _check_taken(taken: Lease | OSError | None, folder: Path) -> None:
    """Raise on all ranks together when the lease cannot be taken; without it nobody trains.

    Raises:
        CheckpointError: the lease cannot be taken.
    """

    def check() -> None:
        if isinstance(taken, OSError):
            raise taken

    remedy = "; use another run.dir, or checkpoint.dir"
    Ranks().first(f"taking the lease of run.dir={folder}", check, remedy)
