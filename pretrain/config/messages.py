"""What is said about a bad value: one line with the key, the value, the rule and the remedy."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pretrain.config.schema import FIELDS, SECTIONS
from xlstm_io.field_errors import rule_of
from xlstm_io.terminal import one_line
from xlstm_mcore.pattern import PatternError
from xlstm_mcore.settings import Section

#: What other trainers (Megatron-LM, torchtitan, nanoGPT) call a key: a likely name would mislead.
_NAMED_ELSEWHERE = {
    **dict.fromkeys(("num_layers", "n_layers", "n_layer", "num_blocks"), "model.pattern"),
    **dict.fromkeys(("d_model", "n_embd", "dim"), "model.hidden_size"),
    "num_query_groups": "model.attention_kv_heads",
    "batch_size": "data.global_batch",
    **dict.fromkeys(("train_iters", "max_iters"), "run.steps"),
    "output_dir": "run.dir",
    **dict.fromkeys(("tensor_model_parallel_size", "tp"), "layout.tensor"),
    **dict.fromkeys(("pipeline_model_parallel_size", "pp"), "layout.pipeline"),
    **dict.fromkeys(("context_parallel_size", "cp"), "layout.context"),
    "dtype": "engine.precision",
    **dict.fromkeys(("learning_rate", "max_lr"), "optimizer.lr"),
    "grad_clip": "optimizer.clip_grad",
    "min_lr": "schedule.min_lr_ratio",
    "save_interval": "checkpoint.interval",
}


def divisors(number: int, limit: int = 64) -> list[int]:
    """Divisors of `number` up to `limit`, ascending."""
    return [n for n in range(1, min(number, limit) + 1) if number % n == 0]


def choices(values: Sequence[object]) -> str:
    """`1, 2, 4 or 8`."""
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def field_message(error: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors: key, value, rule, and what the key means.

    Args:
        error: an item of `ValidationError.errors()`.
    """
    location = [one_line(part) for part in error["loc"] if part != "[key]"]
    key = ".".join(location[:2])
    kind = error["type"]
    if kind == "missing" and len(location) > 2:
        return f"{_place(location)} is missing; set it"
    if kind == "missing":
        if key in SECTIONS:
            needed = [n for n, f in SECTIONS[key].model_fields.items() if f.is_required()]
            return f"section {key} is missing; it needs at least {', '.join(needed)}"
        return f"{key} is missing; set it ({FIELDS[key].description})"
    if kind == "extra_forbidden" and len(location) > 2:
        item = _item_model(key)
        return (
            f"{_place(location[:-1])} has no {location[-1]}; its keys are "
            f"{', '.join(item.model_fields) if item else 'fixed'}"
        )
    if kind == "extra_forbidden":
        section = location[0] if len(location) > 1 else None
        return f"{key} is not a key of a run file; {_similar(location[-1], section)}"
    if kind == "model_type":
        return f"{key}={_show(error['input'])} must be a section; put its keys below it, indented"
    if kind == "value_error" and isinstance(error["ctx"]["error"], PatternError):
        return f"{location[0]}.{error['ctx']['error']}"  # it says all of it, key and value included
    field = FIELDS.get(key)
    about = f" ({field.description})" if field is not None else ""
    return f"{_place(location)}={_show(error['input'])} {rule_of(error)}{about}"


def _similar(key: str, section: str | None) -> str:
    """`did you mean ...?` for an unknown key, or the list of keys that there are."""
    if key in _NAMED_ELSEWHERE:
        meant = _NAMED_ELSEWHERE[key]
        return f"did you mean {meant} ({FIELDS[meant].description})?"
    homes = [dotted for dotted in FIELDS if dotted.endswith(f".{key}")]
    if section is None:
        close = difflib.get_close_matches(key, SECTIONS, n=1) or homes
        return f"did you mean {close[0]}?" if close else f"the sections are {', '.join(SECTIONS)}"
    own = list(SECTIONS[section].model_fields)
    close = difflib.get_close_matches(key, own, n=1) or [k for k in own if key in k.split("_")]
    if close:
        return f"did you mean {section}.{close[0]}?"
    if homes:
        return f"did you mean {homes[0]}?"
    return f"the keys of {section} are {', '.join(own)}"


def _show(value: Any) -> str:
    """A value as it would stand in the file."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return repr(value)


def _place(location: list[str]) -> str:
    """`data.sources[0].weight` from the parts of a location."""
    words = [f"[{part}]" if part.isdigit() else f".{part}" for part in location[2:]]
    return ".".join(location[:2]) + "".join(words)


def _item_model(key: str) -> type[Section] | None:
    """The section that a key, or the items of a list key, are; None for something else."""
    kind = FIELDS[key].annotation if key in FIELDS else None
    item = next(iter(get_args(kind)), kind)
    return item if isinstance(item, type) and issubclass(item, Section) else None
