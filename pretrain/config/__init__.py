"""Run configuration: one YAML file per run, checked whole before anything starts.

`load_config(path, overrides)` reads a file and dotted command-line overrides and returns a
`RunConfig`, or raises `ConfigError` with all problems in one message: those of single fields, or,
once there are none, those between fields. `save_config` writes every key with its value; reading it
back gives an equal configuration. `check_world` adds the rules that need the number of processes.
Nothing here imports torch.
"""

from pretrain.config.load import (
    config_from_dict,
    config_of_checkpoint,
    load_config,
    runnable_text,
    save_config,
)
from pretrain.config.overrides import override_option, split_overrides
from pretrain.config.schema import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    GuardConfig,
    LayoutConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    RunSection,
    ScheduleConfig,
)
from pretrain.config.world import check_world, data_parallel_size, filled_rows, micro_batches
from xlstm_io.errors import ConfigError

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "GuardConfig",
    "LayoutConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "RunSection",
    "ScheduleConfig",
    "check_world",
    "config_from_dict",
    "config_of_checkpoint",
    "data_parallel_size",
    "filled_rows",
    "load_config",
    "micro_batches",
    "override_option",
    "runnable_text",
    "save_config",
    "split_overrides",
]
