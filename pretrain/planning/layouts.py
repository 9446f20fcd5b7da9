"""The layouts that a run could have on a number of GPUs."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from pretrain.config import ConfigError, RunConfig, check_world, config_from_dict
from pretrain.config.cuts import cut_evenly
from xlstm_mcore.pattern import parse_pattern

TENSOR = PIPELINE = (1, 2, 4, 8)
# From the fastest to the one that takes the least memory.
RECOMPUTE = ("none", "selective", "cells", "full")


@dataclass(frozen=True)
class Layout:
    """What a plan may change of a run; none of it changes a result.

    Attributes:
        tensor: tensor-parallel ranks, with sequence parallelism where there are several.
        pipeline: pipeline stages, none of them interleaved.
        recompute: what the backward pass computes again.
        micro_batch: rows of a forward pass.
    """

    tensor: int
    pipeline: int
    recompute: str
    micro_batch: int

    def __str__(self) -> str:
        return (
            f"tensor {self.tensor}, pipeline {self.pipeline}, recompute {self.recompute}, "
            f"micro_batch {self.micro_batch}"
        )


def shapes() -> Iterator[tuple[int, int]]:
    """Sizes of (tensor, pipeline), the simplest first."""
    return iter(sorted(product(TENSOR, PIPELINE), key=lambda shape: (shape[0] * shape[1], shape)))


def with_layout(config: RunConfig, layout: Layout, gpus: int) -> RunConfig:
    """The same run with another layout.

    Raises:
        ConfigError: the run cannot have it on so many GPUs; the message says why.
    """
    values = config.model_dump(mode="json")
    letters = parse_pattern(config.model.pattern).letters
    if layout.pipeline > len(letters):
        raise ConfigError(f"{layout.pipeline} stages are more than {len(letters)} blocks")
    values["model"]["pattern"] = cut_evenly(config, layout.pipeline)
    values["layout"] |= {
        "tensor": layout.tensor,
        "sequence": layout.tensor > 1,
        "pipeline": layout.pipeline,
        "virtual": 1,
    }
    values["memory"]["recompute"] = layout.recompute
    values["data"]["micro_batch"] = layout.micro_batch
    changed = config_from_dict(values)
    check_world(changed, gpus)
    return changed
