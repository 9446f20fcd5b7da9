"""What a number of processes makes of a run: replicas, micro-batches, and whether it can start."""

import importlib.util
from collections.abc import Iterator

from pretrain.config.schema import RunConfig
from xlstm_io.errors import ConfigError
from xlstm_io.terminal import counted


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """The number of data parallel replicas that `world_size` processes make.

    Raises:
        ConfigError: the processes do not hold a whole number of replicas.
    """
    layout = config.layout
    replica = layout.tensor * layout.pipeline * layout.context
    if world_size < replica or world_size % replica:
        raise ConfigError(
            f"{counted(world_size, 'process', 'processes')} cannot hold layout.tensor="
            f"{layout.tensor} x layout.pipeline={layout.pipeline} x layout.context="
            f"{layout.context}; start {replica} or a multiple of {replica}, or change the layout"
        )
    return world_size // replica


def _missing_packages(config: RunConfig) -> Iterator[str]:
    """Optional packages that a run needs; whoever only reads its configuration does without."""
    if config.engine.name == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        yield (
            "engine.name=deepspeed, but DeepSpeed is not installed; "
            "pip install 'deepspeed>=0.19,<0.20', or use engine.name=megatron"
        )
    project = config.logging.wandb.project
    if project is not None and importlib.util.find_spec("wandb") is None:
        yield (
            f"logging.wandb.project={project}, but wandb is not installed; "
            "pip install 'xlstm-pretrain[logging]', or leave the key out"
        )


def micro_batches(config: RunConfig, replicas: int, batch: int | None = None) -> int:
    """Micro-batches of a step on each replica.

    With `data.fill_batch` the last ones may hold rows without a loss.

    Args:
        config: the run.
        replicas: data parallel size.
        batch: rows of the global batch; None for that after the ramp.
    """
    data, layout = config.data, config.layout
    number = -(-(batch or data.global_batch) // (data.micro_batch * replicas))
    # The interleaved schedule takes whole groups only.
    group = layout.pipeline if layout.virtual > 1 and data.fill_batch else 1
    return -(-number // group) * group


def filled_rows(config: RunConfig, replicas: int) -> str:
    """What `data.fill_batch` costs on so many replicas; empty where it fills nothing up."""
    rows = micro_batches(config, replicas) * config.data.micro_batch * replicas
    wanted = config.data.global_batch
    if rows == wanted:
        return ""
    return (
        f"data.fill_batch computes {rows:,} rows for {wanted:,}: {rows / wanted - 1:.1%} more "
        f"work per step, for {counted(replicas, 'replica')}"
    )


def check_world(config: RunConfig, world_size: int) -> int:
    """Check a run that is to start: its packages, and layout and batch for its processes.

    Returns:
        The data parallel size.

    Raises:
        ConfigError: a package is not installed; processes are missing or left over; the global
            batch does not split over replicas and micro-batches; or the interleaved schedule gets
            a number of micro-batches that is not a multiple of the pipeline size.
    """
    missing = list(_missing_packages(config))
    if missing:
        raise ConfigError("\n".join(missing))
    replicas = data_parallel_size(config, world_size)
    data, layout = config.data, config.layout
    rows = data.micro_batch * replicas
    for place, batch in () if data.fill_batch else data.global_batches:
        if batch % rows:
            raise ConfigError(
                f"{place}.global_batch={batch} does not split into data.micro_batch="
                f"{data.micro_batch} rows on each of {replicas} data parallel replicas; use a "
                f"multiple of {rows}, such as {batch + rows - batch % rows}, "
                "or a smaller micro_batch; data.fill_batch=true fills it with rows without a loss"
            )
        number = batch // rows
        if layout.virtual > 1 and number % layout.pipeline:
            raise ConfigError(
                f"layout.virtual={layout.virtual} needs a multiple of layout.pipeline="
                f"{layout.pipeline} micro-batches per step, but there are {number} "
                f"({place}.global_batch={batch} over {rows} rows at a time); use {place}."
                f"global_batch={rows * layout.pipeline * -(-number // layout.pipeline)}"
            )
    return replicas
