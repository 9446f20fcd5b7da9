"""Rules between fields. Each message says the values, the rule, and what would work.

A check is a generator of messages. All checks see a configuration whose fields are sound by
themselves, and all of them run, so that one message names every broken rule.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from pretrain.config import support
from pretrain.config.checks.data import DATA_CHECKS
from pretrain.config.checks.kernels import KERNEL_CHECKS
from pretrain.config.checks.layout import LAYOUT_CHECKS, letters_of
from pretrain.config.messages import choices, divisors
from pretrain.config.schema import FIELDS, RunConfig
from xlstm_io.errors import ConfigError
from xlstm_mcore.pattern import shorten
from xlstm_mcore.sizes.dimensions import attention_heads, dimensions

# Far from the limits, so that products of two values stay below them too.
LARGEST_NUMBER, LARGEST_COUNT = 1e30, 10**15


def _magnitudes(config: RunConfig) -> Iterator[str]:
    """Numbers that torch cannot convert: it computes in fp32 and counts in 64 bits."""
    for key in FIELDS:
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and abs(number) > LARGEST_NUMBER:
                yield f"{key}={number:g} is too large for fp32; use at most {LARGEST_NUMBER:g}"
            if isinstance(number, int) and number > LARGEST_COUNT and key != "run.seed":
                yield f"{key}={number} is too large; use at most {LARGEST_COUNT}"


def _vocab_tokens(config: RunConfig) -> Iterator[str]:
    tokens, rows = config.model.vocab_tokens, config.model.vocab_size
    if tokens is not None and tokens > rows:
        yield (
            f"model.vocab_tokens={tokens} is more than the rows of model.vocab_size={rows}; "
            f"use {rows} or less, or leave it out"
        )


def _head_widths(config: RunConfig) -> Iterator[str]:
    model, letters = config.model, letters_of(config)
    dims, heads = dimensions(model), model.num_heads
    widths = []
    if "M" in letters:
        widths += [("hidden_size times model.qk_dim_factor", dims.qk)]
        widths += [("hidden_size times model.v_dim_factor", dims.v)]
    if "m" in letters:
        widths += [("hidden_size times model.up_dim_factor (rounded up)", dims.up)]
    if {"s", "l"} & set(letters):
        widths += [("hidden_size", model.hidden_size)]
    for name, width in widths:
        if width == 0:
            yield f"model.{name} rounds to 0; use a larger factor"
        elif width % heads:
            yield (
                f"model.num_heads={heads} does not divide model.{name} = {width}; "
                f"use {choices(divisors(width))} heads, or another hidden size"
            )


def _ffn_over_tensor(config: RunConfig) -> Iterator[str]:
    model, tensor, letters = config.model, config.layout.tensor, letters_of(config)
    dims = dimensions(model)
    for users, key, width in (
        ("M*", "ffn_dim_factor", dims.ffn),
        ("m", "up_dim_factor", dims.up),
        ("sl", "slstm_ffn_dim_factor", dims.slstm_ffn),
    ):
        if set(users) & set(letters) and width % tensor:
            yield (
                f"layout.tensor={tensor} does not divide the width {width} that "
                f"model.{key}={getattr(model, key)} gives; "
                f"set model.round_up_to to a multiple of {tensor}"
            )


def _attention(config: RunConfig) -> Iterator[str]:
    if "*" not in letters_of(config):
        return
    model, layout = config.model, config.layout
    hidden, (heads, kv_heads) = model.hidden_size, attention_heads(model)
    key = "attention_heads" if model.attention_heads else "num_heads"
    if hidden % heads or hidden // heads % 2:
        even = [n for n in divisors(hidden) if hidden // n % 2 == 0]
        works = (
            f"use {choices(even)}, or set model.attention_heads"
            if even
            else "use an even model.hidden_size"
        )
        yield (
            f"model.{key}={heads} does not cut model.hidden_size={hidden} into heads of an even "
            f"width, which the rotary positions of * need; {works}"
        )
    if model.attention_sinks and model.attention_window is None:
        yield (
            f"model.attention_sinks={model.attention_sinks} are seen from outside a window, and "
            "model.attention_window=null lets * see all tokens; set model.attention_window, or "
            "leave the sinks out"
        )
    if heads % kv_heads:
        yield (
            f"model.attention_kv_heads={kv_heads} does not divide the {heads} heads of * "
            f"(model.{key}); use {choices(divisors(heads))}"
        )
    kv_key = "attention_kv_heads" if model.attention_kv_heads else key
    split = layout.tensor * layout.context
    if kv_heads % split:
        yield (
            f"layout.tensor={layout.tensor} times layout.context={layout.context} does not divide "
            f"model.{kv_key}={kv_heads}, the heads of k and v in *; use sizes whose product is "
            f"{choices(divisors(kv_heads))}"
        )


def _qkv_blocks(config: RunConfig) -> Iterator[str]:
    model, up = config.model, dimensions(config.model).up
    if "m" not in letters_of(config) or up % model.num_heads:
        return
    block, width = model.qkv_block_size, up // model.num_heads
    if width % block:
        yield (
            f"model.qkv_block_size={block} does not divide the width {width} of a head of the m "
            f"blocks, which is the inner width {up} over model.num_heads={model.num_heads}; use "
            f"{choices(divisors(width, 16))}, or other heads"
        )


def _ablations(config: RunConfig) -> Iterator[str]:
    model = config.model
    plain = model.mlstm_gate == "exp" and model.mlstm_normalize
    if config.layout.context > 1 and not plain and {"M", "m"} & set(letters_of(config)):
        yield (
            f"layout.context={config.layout.context} passes the state of the mLSTM with an "
            f"exponential, normalised gate only, but model.mlstm_gate={model.mlstm_gate} and "
            f"model.mlstm_normalize={str(model.mlstm_normalize).lower()}; use layout.context=1"
        )


def _init_from(config: RunConfig) -> Iterator[str]:
    run = config.run
    if run.init_from is None and run.init_optimizer:
        yield "run.init_optimizer=true takes the optimizer's state of run.init_from; set that too"
    if run.init_from is not None and Path(run.init_from) == Path(run.dir):
        yield (
            f"run.init_from={run.init_from} is run.dir too, where a run continues by itself; give "
            "the new run another run.dir"
        )


def _recompute(config: RunConfig) -> Iterator[str]:
    letters = "".join(sorted(set(letters_of(config))))
    blocks = config.memory.recompute_full_blocks
    for letter in sorted(set(blocks) - set(letters)):
        yield (
            f"memory.recompute_full_blocks='{shorten(blocks)}' names '{letter}', which "
            f"model.pattern does not contain; use letters of '{letters}'"
        )


def _schedule(config: RunConfig) -> Iterator[str]:
    schedule, steps = config.schedule, config.run.steps
    if schedule.warmup_steps + schedule.cooldown_steps > steps:
        yield (
            f"schedule.warmup_steps={schedule.warmup_steps} and schedule.cooldown_steps="
            f"{schedule.cooldown_steps} do not fit into run.steps={steps}; shorten them or train "
            "longer"
        )


def _exponential(config: RunConfig) -> Iterator[str]:
    schedule = config.schedule
    if schedule.name == "exponential" and schedule.min_lr_ratio == 0:
        yield (
            "schedule.min_lr_ratio=0 is never reached by schedule.name=exponential; use a ratio "
            "above 0, such as 0.1, or schedule.cooldown_steps"
        )
    if schedule.cooldown_shape == "exponential" and schedule.cooldown_min_lr_ratio == 0:
        yield (
            "schedule.cooldown_min_lr_ratio=0 is never reached by schedule.cooldown_shape="
            "exponential; use a ratio above 0, such as 0.01, or another shape"
        )


def _wsd(config: RunConfig) -> Iterator[str]:
    if config.schedule.name == "wsd" and config.schedule.cooldown_steps == 0:
        tenth = max(1, config.run.steps // 10)
        yield (
            "schedule.name=wsd ends in a cooldown, but schedule.cooldown_steps=0; use, for "
            f"example, {tenth} (a tenth of run.steps), or schedule.name=constant"
        )


def _engine(config: RunConfig) -> Iterator[str]:
    """The support matrix, see `pretrain.config.support`."""
    cell = support.Combination.of(config)
    if not support.is_layout(cell):
        return  # has a message of its own
    reason = support.unsupported_reason(cell)
    if reason:
        yield reason


def _tied_over_stages(config: RunConfig) -> Iterator[str]:
    engine, tied = config.engine, config.model.tie_embeddings
    host = engine.offload == "optimizer" and support.zero_stage(config) == 1
    if host and engine.precision == "bf16" and tied and config.layout.pipeline > 1:
        yield (
            "model.tie_embeddings=true has a copy on the first and the last pipeline stage, and "
            "with engine.offload=optimizer and engine.precision=bf16 their gradients leave for the "
            "host before they can be added; use engine.offload=none, engine.precision=fp32 or "
            "layout.pipeline=1"
        )


def _cells(config: RunConfig) -> Iterator[str]:
    cells, offload = config.logging.cells, config.engine.offload
    if cells and offload != "none":
        yield (
            f"logging.cells={cells} reads gradients and optimizer state on the device, and "
            f"engine.offload={offload} keeps them in host memory; use logging.cells=0 or "
            "engine.offload=none"
        )


CHECKS: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
    _magnitudes,
    *LAYOUT_CHECKS,
    _vocab_tokens,
    _head_widths,
    _ffn_over_tensor,
    _attention,
    _qkv_blocks,
    _ablations,
    _init_from,
    _cells,
    _recompute,
    *KERNEL_CHECKS,
    *DATA_CHECKS,
    _schedule,
    _exponential,
    _wsd,
    _engine,
    _tied_over_stages,
)


def problems(config: RunConfig) -> list[str]:
    """The messages of all checks; an empty list is a good configuration."""
    return [message for check in CHECKS for message in check(config)]


def check_vocabulary(config: RunConfig, tokens: int, source: object) -> None:
    """Check that the model has a row of its embedding for every token of the data.

    Args:
        config: the run.
        tokens: number of tokens that the data's tokenizer has.
        source: the data's folder, for the message.

    Raises:
        ConfigError: `model.vocab_size` is smaller, or `model.vocab_tokens`.
    """
    for key in ("vocab_size", "vocab_tokens"):
        rows = getattr(config.model, key)
        if rows is not None and tokens > rows:
            raise ConfigError(
                f"model.{key}={rows} is smaller than the {tokens} tokens of the tokenizer in "
                f"{source}; set model.{key} to at least {tokens}"
            )
