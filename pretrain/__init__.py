"""The trainer: configuration, launch, training loop, checkpoints, reports."""

import xlstm_mcore  # noqa: F401 (quietens megatron-core before anything imports it)
