"""Rules of the data section that need more than one field: mixture, phases, batches."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from pretrain.config.messages import choices, divisors
from pretrain.config.schema import RunConfig
from xlstm_io.remote import is_remote


def _one_kind(config: RunConfig) -> Iterator[str]:
    data = config.data
    if data.path is None and not data.sources:
        yield (
            "data.path is missing; set it (folder that `python -m data_prep build` wrote), or "
            "data.sources for a mixture"
        )
    if data.path is not None and data.sources:
        yield (
            f"data.path={data.path!r} and data.sources are both given; keep one, a path is a "
            "mixture of one source"
        )


def _names(config: RunConfig) -> Iterator[str]:
    for key in ("sources", "valid"):
        counts = Counter(item.name for item in getattr(config.data, key))
        for name, count in counts.items():
            if count > 1:
                yield f"data.{key}: the name {name!r} is given {count} times; give each its own"


def _weights(config: RunConfig) -> Iterator[str]:
    data = config.data
    if not data.sources:
        if data.phases:
            yield "data.phases mixes data.sources, and there are none; name the sources first"
        return
    names = [source.name for source in data.sources]
    if all(source.weight is None for source in data.sources):
        yield f"data.sources: none of {', '.join(names)} has a weight; give at least one"
    in_phases = {name for phase in data.phases for name in phase.weights}
    for source in data.sources:
        if source.weight is None and source.name not in in_phases:
            yield (
                f"data.sources: {source.name!r} has no weight and no phase names it, so it would "
                "never be read; give it a weight or take it out"
            )
    start = {s.name: s.weight for s in data.sources if s.weight is not None}
    mixtures = [("data.sources", start)]
    for number, phase in enumerate(data.phases):
        place = f"data.phases[{number}]"
        for name in phase.weights:
            if name not in names:
                yield f"{place}: {name!r} is not one of data.sources; use {', '.join(names)}"
        mixtures.append((place, phase.weights))
    for place, weights in mixtures:
        for name, weight in weights.items():
            share = weight / sum(weights.values())
            if share < 1e-4:
                yield (
                    f"{place}: {name!r} has a share of {share:.2g}, less than the smallest that a "
                    "mixture can keep, 0.0001; give it more weight or take it out"
                )


def _phase_order(config: RunConfig) -> Iterator[str]:
    starts = [phase.from_sample for phase in config.data.phases]
    for number, (before, after) in enumerate(pairwise(starts), 1):
        if after <= before:
            yield (
                f"data.phases[{number}].from_sample={after} does not come after {before}, where "
                "the phase before it starts; put the phases in order"
            )


def _batch(config: RunConfig) -> Iterator[str]:
    data = config.data
    for place, batch in data.global_batches:
        if batch % data.micro_batch and not data.fill_batch:
            yield (
                f"data.micro_batch={data.micro_batch} does not divide {place}.global_batch="
                f"{batch}; use {choices(divisors(batch))}"
            )


def _remote(config: RunConfig) -> Iterator[str]:
    for key, path in config.data.folders:
        if is_remote(path) and config.data.cache_dir is None:
            yield (
                f"{key}={path!r} is remote, and its shards are read from local copies; set "
                "data.cache_dir to a folder on a local disk"
            )


DATA_CHECKS = (_remote, _one_kind, _names, _weights, _phase_order, _batch)
