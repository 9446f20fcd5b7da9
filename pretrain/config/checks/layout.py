"""Rules of the layout section: what its sizes have to divide."""

from collections.abc import Iterator

from pretrain.config.messages import choices, divisors
from pretrain.config.schema import RunConfig
from xlstm_io.terminal import counted
from xlstm_mcore.pattern import parse_pattern, shorten
from xlstm_mcore.sizes.dimensions import dimensions


def letters_of(config: RunConfig) -> tuple[str, ...]:
    """The block letter of every layer."""
    return parse_pattern(config.model.pattern).letters


def _stages(config: RunConfig) -> Iterator[str]:
    pipeline, virtual = config.layout.pipeline, config.layout.virtual
    pattern = parse_pattern(config.model.pattern)
    stages, blocks, wanted = len(pattern.stages), len(pattern.letters), pipeline * virtual
    if stages == 1 and blocks < wanted:
        yield (
            f"model.pattern='{shorten(config.model.pattern)}' has {counted(blocks, 'block')}, but "
            f"layout.pipeline={pipeline} times layout.virtual={virtual} needs {wanted} stages; use "
            "a smaller layout.pipeline"
        )
    elif stages not in (1, wanted):  # without a cut the stages get about the same work
        yield (
            f"model.pattern='{shorten(config.model.pattern)}' has {counted(stages, 'stage')}, but "
            f"layout.pipeline={pipeline} times layout.virtual={virtual} needs {wanted}; write "
            f"{counted(wanted - 1, 'cut')} (|) into the pattern or change the layout"
        )


def _virtual(config: RunConfig) -> Iterator[str]:
    if config.layout.virtual > 1 and config.layout.pipeline == 1:
        yield (
            f"layout.virtual={config.layout.virtual} interleaves pipeline stages, but "
            "layout.pipeline=1 has none; set layout.virtual=1 or layout.pipeline=2 or more"
        )


def _heads_over_tensor(config: RunConfig) -> Iterator[str]:
    tensor, heads = config.layout.tensor, config.model.num_heads
    if heads % tensor and set(letters_of(config)) - {"*", "d"}:
        yield (
            f"layout.tensor={tensor} does not divide model.num_heads={heads}; "
            f"use {choices(divisors(heads))}"
        )


def _vocab_over_tensor(config: RunConfig) -> Iterator[str]:
    tensor, vocab = config.layout.tensor, config.model.vocab_size
    if vocab % tensor:
        yield (
            f"layout.tensor={tensor} does not divide model.vocab_size={vocab}; "
            f"use model.vocab_size={vocab + tensor - vocab % tensor}, the next multiple"
        )


def _sequence(config: RunConfig) -> Iterator[str]:
    layout = config.layout
    if layout.sequence and layout.tensor == 1:
        yield (
            "layout.sequence=true splits over the tensor parallel processes, but layout.tensor=1 "
            "has none; set layout.sequence=false or layout.tensor=2 or more"
        )


def _sequence_length(config: RunConfig) -> Iterator[str]:
    layout, length = config.layout, config.data.seq_len
    split = layout.context * (layout.tensor if layout.sequence else 1)
    if length % split:
        yield (
            f"data.seq_len={length} does not split into {split} parts (layout.context="
            f"{layout.context}, layout.tensor={layout.tensor} with layout.sequence="
            f"{str(layout.sequence).lower()}); use a multiple, such as "
            f"{length + split - length % split}"
        )


def _tokens_over_context(config: RunConfig) -> Iterator[str]:
    if not {"m", "d"} & set(letters_of(config)):
        return
    layout, length, before = config.layout, config.data.seq_len, config.model.conv_width - 1
    fit = [n for n in divisors(length) if n == 1 or length // n >= before]
    if layout.context > 1 and length // layout.context < before:
        yield (
            f"layout.context={layout.context} leaves {length // layout.context} tokens of "
            f"data.seq_len={length} to a process, but the convolution of m and d looks back "
            f"model.conv_width - 1 = {before} tokens, into one process at most; use "
            f"layout.context={choices(fit)}"
        )


def _heads_over_context(config: RunConfig) -> Iterator[str]:
    layout, heads = config.layout, config.model.num_heads
    if not {"s", "l"} & set(letters_of(config)):
        return
    if layout.context == 1 or heads % layout.tensor:
        return
    if heads % (layout.tensor * layout.context):
        yield (
            f"model.num_heads={heads} does not split over layout.tensor={layout.tensor} times "
            f"layout.context={layout.context} processes, and a head of s or l "
            f"cannot be cut; use layout.context={choices(divisors(heads // layout.tensor))}"
        )


def _mamba_over_tensor(config: RunConfig) -> Iterator[str]:
    if "d" not in letters_of(config):
        return
    model, tensor = config.model, config.layout.tensor
    heads = dimensions(model).mamba // model.ssm_head_dim
    if heads % tensor:
        yield (
            f"layout.tensor={tensor} does not divide the {heads} heads of d, which come of "
            f"model.ssm_head_dim={model.ssm_head_dim}; use {choices(divisors(heads))}"
        )
    if model.ssm_state_dim % tensor:
        yield (
            f"layout.tensor={tensor} does not divide model.ssm_state_dim="
            f"{model.ssm_state_dim}; use {choices(divisors(model.ssm_state_dim))}"
        )


LAYOUT_CHECKS = (
    _stages,
    _virtual,
    _heads_over_tensor,
    _vocab_over_tensor,
    _sequence,
    _sequence_length,
    _tokens_over_context,
    _heads_over_context,
    _mamba_over_tensor,
)
