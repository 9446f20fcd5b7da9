"""The layouts that a run could have on a number of GPUs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from pretrain.config import ConfigError, RunConfig, check_world, config_from_dict
from xlstm_mcore.pattern import parse_pattern
from xlstm_mcore.sizes.flops import block_flops

TENSOR = PIPELINE = (1, 2, 4, 8)
# From the fastest to the one that takes the least memory.
RECOMPUTE = ("none", "selective", "full")


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


def cut_evenly(config: RunConfig, stages: int) -> str:
    """The pattern cut into stages of about the same work, the head's counted with the last one's.

    Args:
        config: the run.
        stages: not more than there are blocks.
    """
    model = config.model
    letters = parse_pattern(model.pattern).letters
    costs = [
        float(sum(block_flops(letter, model, config.data.seq_len).values())) for letter in letters
    ]
    costs[-1] += 2 * model.hidden_size * model.vocab_size
    cuts = _least_largest(costs, stages)
    return "|".join("".join(letters[a:b]) for a, b in pairwise((0, *cuts, len(letters))))


def _least_largest(costs: Sequence[float], parts: int) -> tuple[int, ...]:
    """Where to cut a sequence so that its largest part is as small as can be."""
    # best[n]: largest part and cuts of the first n costs, in as many parts as were made so far.
    best = [(sum(costs[:n]), ()) for n in range(len(costs) + 1)]
    for made in range(1, parts):
        best = [
            min(
                ((max(best[k][0], sum(costs[k:n])), (*best[k][1], k)) for k in range(made, n)),
                default=(float("inf"), ()),
            )
            for n in range(len(costs) + 1)
        ]
    return best[-1][1]
