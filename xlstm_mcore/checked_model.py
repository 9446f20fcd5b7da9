"""The model that somebody else's file describes, checked before memory is taken for it.

A configuration of a few bytes can ask for terabytes, and one pattern for a million layers. So the
numbers of a model are compared with the tensors that are there before anything is built.
"""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from xlstm_io.checkpoint.manifest import Manifest, is_weight
from xlstm_io.errors import CheckpointError, UserError
from xlstm_io.field_errors import key_of, rule_of
from xlstm_io.storage import Location
from xlstm_io.terminal import one_line
from xlstm_mcore.old_keys import current_keys
from xlstm_mcore.pattern import parse_pattern
from xlstm_mcore.settings import ModelConfig
from xlstm_mcore.sizes.dimensions import attention_heads, dimensions
from xlstm_mcore.sizes.parameters import count_parameters

LARGEST = 1 << 31
"""Sizes above this are nonsense, whatever a file says."""


def checked_model(
    section: Mapping[str, Any],
    *,
    tensors: int,
    source: object,
    error: type[UserError] = CheckpointError,
) -> ModelConfig:
    """The model of a `model:` section, if it is one that so many tensors can hold.

    Args:
        section: The section, with today's keys.
        tensors: How many tensors there are; each layer has one at least.
        source: Where the section stands, for the message.
        error: What is raised.

    Raises:
        UserError: Of the class `error`; the message holds the key, its value and the rule.
    """
    pattern = section.get("pattern")
    if not isinstance(pattern, str) or len(pattern) > 2 * tensors:  # "|" may follow each letter
        raise error(f"{source}: the pattern has more layers than there are tensors")
    try:
        model = ModelConfig.model_validate(section)
        letters = set(parse_pattern(model.pattern).letters)
        widths, (heads, kv_heads) = dimensions(model), attention_heads(model)
    except ValidationError as problem:
        first = problem.errors()[0]
        value = one_line(first["input"])[:60]
        raise error(f"{source}: model.{key_of(first['loc'])}={value} {rule_of(first)}") from None
    except (UserError, OverflowError) as problem:
        raise error(f"{source}: {problem}") from None
    if (model.vocab_tokens or 1) > model.vocab_size:
        raise error(
            f"{source}: model.vocab_tokens={model.vocab_tokens} is more than the rows of "
            f"model.vocab_size={model.vocab_size}"
        )
    sizes = (model.vocab_size, model.hidden_size, widths.qk, widths.v, widths.ffn, widths.up)
    largest = max(*sizes, widths.slstm_ffn, heads, model.num_heads, model.conv_width)
    if largest >= LARGEST:
        raise error(f"{source}: a width of {largest} is not one of a model")
    by_head = (model.hidden_size,)
    divided = {"M": (widths.qk, widths.v), "m": (widths.up,), "s": by_head, "l": by_head}
    for width in (width for letter in letters for width in divided.get(letter, ())):
        if width % model.num_heads:
            raise error(f"{source}: {model.num_heads} heads do not divide a width of {width}")
    if "m" in letters and widths.up % model.qkv_block_size:
        raise error(
            f"{source}: model.qkv_block_size={model.qkv_block_size} does not divide a width of "
            f"{widths.up}"
        )
    if "*" in letters and (model.hidden_size % heads or heads % kv_heads):
        raise error(
            f"{source}: {heads} attention heads do not divide a width of {model.hidden_size}, or "
            f"{kv_heads} heads of keys do not divide them"
        )
    return model


def model_of(manifest: Manifest, path: Location) -> ModelConfig:
    """The model that a checkpoint's configuration describes, without pipeline cuts.

    Args:
        manifest: The checkpoint's.
        path: The checkpoint, for messages.

    Raises:
        CheckpointError: It describes no model.
        ConfigError: A key asks for what no longer exists.
    """
    section = current_keys(manifest.config).get("model")
    if not isinstance(section, Mapping):
        raise CheckpointError(f"{path}: its config has no model section")
    tensors = sum(map(is_weight, manifest.tensors))
    model = checked_model(section, tensors=tensors, source=path)
    return model.model_copy(update={"pattern": model.pattern.replace("|", "")})


def check_parameters(model: ModelConfig, manifest: Manifest, path: Location) -> None:
    """Check that a model has as many parameters as its checkpoint, so it can be built.

    Raises:
        CheckpointError: It has more or fewer.
    """
    shapes = (info.shape for name, info in manifest.tensors.items() if is_weight(name))
    wanted, found = count_parameters(model)["total"], sum(map(math.prod, shapes))
    if wanted != found:
        raise CheckpointError(
            f"{path}: its config makes a model of {wanted:,} parameters, its tensors have {found:,}"
        )
