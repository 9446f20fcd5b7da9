"""The same run at small widths: what a layout does to a model does not depend on its size."""

import math

from pretrain.config import RunConfig, data_parallel_size
from pretrain.config.checks.fields import problems
from xlstm_io.errors import ConfigError

HEAD_WIDTH = 32  # of v; q and k have half of it by default, and Triton's tiles need 16
VOCABULARY = 512
TOKENS_PER_RANK = 64
MICRO_BATCH = 2


def smaller(config: RunConfig, world_size: int) -> RunConfig:
    """A small run with the blocks, heads, layout, engine and memory settings of a large one.

    Every stage keeps one block of each letter that it has.

    Args:
        config: the run.
        world_size: its processes.

    Raises:
        ConfigError: the model cannot be made small; the message says which rule is in the way.
    """
    raw, layout = config.model_dump(), config.layout
    model, data = raw["model"], raw["data"]
    stages = config.model.pattern.split("|")
    model["pattern"] = "|".join("".join(dict.fromkeys(stage)) for stage in stages)
    heads = math.lcm(config.model.num_heads, config.model.attention_heads or 1)
    model["hidden_size"] = min(config.model.hidden_size, heads * HEAD_WIDTH)
    model["vocab_size"] = min(config.model.vocab_size, VOCABULARY * layout.tensor)
    model["vocab_tokens"] = None
    data["seq_len"] = min(data["seq_len"], TOKENS_PER_RANK * layout.tensor * layout.context)
    if config.model.attention_window is not None:  # shorter than a row, as before
        model["attention_window"] = min(config.model.attention_window, data["seq_len"] // 4 or 1)
    data["micro_batch"] = min(data["micro_batch"], MICRO_BATCH)
    data["batch_ramp"] = []
    replicas = data_parallel_size(config, world_size)
    rows = data["micro_batch"] * replicas * max(2, layout.pipeline)
    data["global_batch"] = rows
    small = RunConfig.model_validate(raw)
    found = problems(small)
    if found:
        raise ConfigError(
            "--small cannot make this model smaller; give sizes as options instead, such as "
            "--model.hidden_size:\n  " + "\n  ".join(found)
        )
    return small
