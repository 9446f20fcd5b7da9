"""Where a pattern is cut into pipeline stages when the run file does not say it."""

from collections.abc import Sequence
from itertools import pairwise

from pretrain.config.schema import RunConfig
from xlstm_mcore.pattern import parse_pattern
from xlstm_mcore.sizes.flops import block_flops


def with_cuts(config: RunConfig) -> RunConfig:
    """The run with its pattern cut for its layout; a pattern that has cuts is kept as it is.

    Cuts belong to the layout: they change no result, and a resume may have others.

    Args:
        config: a run without problems.
    """
    stages = config.layout.pipeline * config.layout.virtual
    if stages == 1 or "|" in config.model.pattern:
        return config
    model = config.model.model_copy(update={"pattern": cut_evenly(config, stages)})
    return config.model_copy(update={"model": model})


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
    best: list[tuple[float, tuple[int, ...]]] = [
        (sum(costs[:n]), ()) for n in range(len(costs) + 1)
    ]
    for made in range(1, parts):
        best = [
            min(
                ((max(best[k][0], sum(costs[k:n])), (*best[k][1], k)) for k in range(made, n)),
                default=(float("inf"), ()),
            )
            for n in range(len(costs) + 1)
        ]
    return best[-1][1]
