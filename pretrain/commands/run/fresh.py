"""`--fresh`: a run starts anew, and the folder of the old one gets another name."""

import os
from pathlib import Path

from pretrain.config import RunConfig
from pretrain.supervision.lease import began_by_same_torchrun, check_free
from xlstm_io.errors import ConfigError
from xlstm_io.storage import absolute
from xlstm_io.terminal import tell

# A batch job that was requeued runs the same command line again, and so do the workers that
# torchrun starts again after an error. They go on.
RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


def start_anew(config: RunConfig, run_file: str, *, take_over: bool) -> None:
    """Rename the run folder, before anything is written there.

    Args:
        config: the run.
        run_file: where it was read from.
        take_over: rename it even from a life that may be at work.

    Raises:
        ConfigError: checkpoints lie elsewhere, or the run file lies in the folder.
        LeaseHeldError: another life is at work in the folder.
    """
    if any(int(os.environ.get(name, "0")) > 0 for name in RESTARTS):
        return
    folder = Path(config.run.dir)
    if began_by_same_torchrun(folder):  # its count does not count that nodes come or go
        tell(f"--fresh: {folder} was begun by this torchrun, by its --rdzv-id, and goes on")
        return
    if config.checkpoint.dir is not None:
        raise ConfigError(
            f"--fresh renames run.dir={folder}, but checkpoint.dir={config.checkpoint.dir} lies "
            "elsewhere; give both other names"
        )
    if absolute(run_file).is_relative_to(absolute(folder)):
        raise ConfigError(
            f"--fresh renames run.dir={folder}, and {run_file} lies in it; copy the run file "
            "to another place and start that"
        )
    if not take_over:
        check_free(folder)
    old = set_aside(folder)
    if old is not None:
        tell(f"starting anew; the old run is in {old}")


def set_aside(folder: Path) -> Path | None:
    """Rename a run folder; its new name, None when there is none.

    Where it is a link, to a larger disk perhaps, what it leads to is renamed. The link stays.
    """
    if not folder.exists():
        return None
    if folder.is_symlink():
        real = absolute(folder)
        old = set_aside(real)
        real.mkdir()
        return old
    number = 1
    while (old := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(old)
    return old
