"""Which keys may differ when a run continues from a checkpoint, or starts from its weights.

`RULES` is the only list of them. A resume asks it (`pretrain.checkpoint.identity`), what is printed
and recorded of a resume comes from it (`pretrain.watching.history`), and docs/configuration.md
shows it. Nothing here imports torch.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pydantic import BaseModel

from pretrain.config.schema import SECTIONS
from xlstm_mcore.old_keys import current_keys


class Rule(Enum):
    """Whether a key may differ from the checkpoint's; the value says it in the documentation."""

    FREE = "yes"
    SAID = "yes, and it is said"
    ASKED = "if accepted"
    FIXED = "no"


@dataclass(frozen=True)
class Rules:
    """What holds for one key.

    Attributes:
        resume: when the same run continues.
        init_from: when another run starts from the weights.
        reason: why, as a phrase.
    """

    resume: Rule
    init_from: Rule
    reason: str


_PLACE = "says where and how, and no result depends on it but for rounding"
_SHAPE = "decides the shapes of what is saved"
_FUNCTION = "what the weights were trained to compute"
_NEW_RUN = "alters what the run learns from here on"
_MEASURED = "alters what is measured or done, not what is learnt"
_COMPARED = "compared by what it leads to: `cursor.plan`"


def _free(reason: str = _PLACE) -> Rules:
    return Rules(Rule.FREE, Rule.FREE, reason)


def _said(reason: str = _NEW_RUN) -> Rules:
    return Rules(Rule.SAID, Rule.FREE, reason)


_SHAPED = Rules(Rule.FIXED, Rule.FIXED, _SHAPE)
_COMPUTED = Rules(Rule.ASKED, Rule.SAID, _FUNCTION)

#: By dotted key; `section.*` stands for the keys of a section that have no line of their own. The
#: last two are not in a run file: a checkpoint knows them of its tokenizer and data.
RULES: dict[str, Rules] = {
    "run.dir": _free(),
    "run.steps": _said("moves the end of the learning-rate curve; see `schedule.extend`"),
    "run.seed": Rules(Rule.ASKED, Rule.FREE, "decides the order of the data"),
    "run.init_from": _free("used at the first start of a run only"),
    "run.init_optimizer": _free("used at the first start of a run only"),
    "run.deterministic": _free(),
    "run.max_minutes": _free(_MEASURED),
    "run.grace_seconds": _free(_MEASURED),
    "run.on_event": _free(_MEASURED),
    "model.pattern": Rules(Rule.FIXED, Rule.FIXED, f"{_SHAPE}; the cuts are free"),
    "model.hidden_size": _SHAPED,
    "model.num_heads": _SHAPED,
    "model.vocab_size": _SHAPED,
    "model.tie_embeddings": _SHAPED,
    "model.qk_dim_factor": _SHAPED,
    "model.v_dim_factor": _SHAPED,
    "model.ffn_dim_factor": _SHAPED,
    "model.up_dim_factor": _SHAPED,
    "model.qkv_block_size": _SHAPED,
    "model.conv_width": _SHAPED,
    "model.slstm_conv_width": _SHAPED,
    "model.ssm_dim_factor": _SHAPED,
    "model.ssm_head_dim": _SHAPED,
    "model.ssm_state_dim": _SHAPED,
    "model.slstm_ffn_dim_factor": _SHAPED,
    "model.attention_heads": _SHAPED,
    "model.attention_kv_heads": _SHAPED,
    "model.round_up_to": _SHAPED,
    "model.igate_bias_init": _free("used at the first step of a new model only"),
    "model.slstm_recurrent_init": _free("used at the first step of a new model only"),
    "model.dropout": _said(),
    "model.chunk_size": _free(),
    "model.kernel_backend": _free(),
    "model.*": _COMPUTED,
    "data.path": _free(_COMPARED),
    "data.sources": _free(_COMPARED),
    "data.shuffle": _free(_COMPARED),
    "data.window_shards": _free(_COMPARED),
    "data.seq_len": Rules(Rule.ASKED, Rule.FREE, "another length has other rows"),
    "data.phases": _said("phases that lie ahead may change; others: `cursor.plan`"),
    "data.valid": _said(_MEASURED),
    "data.global_batch": _said(),
    "data.batch_ramp": _said(),
    "data.on_corrupt": _said(),
    "data.*": _free(),
    "layout.*": _free(),
    "memory.*": _free(),
    "engine.name": _said("both engines compute the same but for rounding"),
    "engine.precision": _said(),
    "engine.grad_reduce": _said(),
    "engine.*": _free(),
    "optimizer.name": Rules(Rule.FIXED, Rule.FREE, "another optimizer has another state"),
    "optimizer.*": _said(),
    "schedule.extend": _free("used when `run.steps` changes"),
    "schedule.*": _said("starts the learning-rate curve anew, from the configuration"),
    "checkpoint.*": _free(),
    "evaluation.max_batches": _said(_MEASURED),
    "evaluation.interval": _free(_MEASURED),
    "evaluation.prompts": _free(_MEASURED),
    "evaluation.prompt_tokens": _free(_MEASURED),
    "guard.stop_on_nonfinite": _said(_MEASURED),
    "guard.spikes": _said(),
    "guard.*": _free(_MEASURED),
    "logging.*": _free(_MEASURED),
    "tokenizer.sha256": Rules(Rule.ASKED, Rule.ASKED, "the ids would mean other text"),
    "cursor.plan": Rules(Rule.ASKED, Rule.FREE, "another order of samples, or other data"),
}


def rules_of(name: str) -> Rules | None:
    """The rules of a key, or of what lies in it; None where no line covers it.

    Args:
        name: a dotted name such as `optimizer.decay.norm`.
    """
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        found = RULES.get(".".join(parts[:end]))
        if found is not None:
            return found
    return RULES.get(f"{parts[0]}.*")


@dataclass(frozen=True)
class Change:
    """A value that differs from the checkpoint's.

    Attributes:
        name: its dotted name.
        before: the checkpoint's value; `(none)` where it does not have the name.
        now: the run's value, likewise.
        rule: whether that is allowed.
    """

    name: str
    before: Any
    now: Any
    rule: Rule

    def __str__(self) -> str:
        return f"{self.name}: checkpoint {self.before}, run {self.now}"


_NONE = "(none)"  # for a name that one of the two does not have


def resume_changes(saved: Mapping[str, Any], run: Mapping[str, Any]) -> list[Change]:
    """What differs between a checkpoint and the run that wants to continue from it.

    The pipeline cuts (`|`) of a pattern belong to the layout and are ignored. A key that an older
    version of this program did not have counts as its default.

    Args:
        saved: the resolved configuration of the checkpoint's run, with `tokenizer` and `cursor` of
            its training state.
        run: the same of the run that wants to continue.
    """
    return [
        Change(name, old, new, rules.resume) for name, old, new, rules in _differing(saved, run)
    ]


def init_changes(saved: Mapping[str, Any], run: Mapping[str, Any]) -> list[Change]:
    """What differs between a checkpoint and the run that wants to start from its weights.

    What the checkpoint does not know (an import has no data) does not count as different.

    Args:
        saved: the configuration in the checkpoint, with `tokenizer` of its training state.
        run: the same of the run.
    """
    return [
        Change(name, old, new, rules.init_from)
        for name, old, new, rules in _differing(saved, run)
        if old != _NONE
    ]


def refused(changes: Iterable[Change], accept: Iterable[str]) -> list[Change]:
    """The changes that are not allowed, those that cannot be accepted first.

    Args:
        changes: what differs.
        accept: keys and sections that may differ where their rule asks: the change is meant.
    """
    accepted = tuple(f"{key}." for key in accept)
    found = [
        change
        for change in changes
        if change.rule is Rule.FIXED
        or (change.rule is Rule.ASKED and not f"{change.name}.".startswith(accepted))
    ]
    return sorted(found, key=lambda change: change.rule is not Rule.FIXED)


def _differing(
    saved: Mapping[str, Any], run: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any, Rules]]:
    """Name, both values and rules of every key that differs."""
    before = flat(with_defaults(current_keys(saved), run))
    now = flat(with_defaults(run, run))
    for name in dict.fromkeys([*before, *now]):
        rules = rules_of(name)
        old, new = before.get(name, _NONE), now.get(name, _NONE)
        if rules is not None and old != new:
            yield name, old, new, rules


def with_defaults(config: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a configuration that `like` has too, with the defaults of absent keys."""
    filled = dict(config)
    for section, model in SECTIONS.items():
        if section not in like:
            filled.pop(section, None)
            continue
        defaults = {
            key: field.get_default(call_default_factory=True)
            for key, field in model.model_fields.items()
            if not field.is_required()
        }
        filled[section] = {**defaults, **config.get(section, {})}
    return filled


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; the pattern without its pipeline cuts."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, BaseModel):
            value = value.model_dump(mode="json")
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        elif isinstance(value, tuple):
            found[name] = list(value)
        else:
            cut = name == "model.pattern" and isinstance(value, str)
            found[name] = value.replace("|", "") if cut else value
    return found


def rules_table() -> Iterator[tuple[str, str, str, str]]:
    """The rows of the table in the documentation: key, on a resume, on an init_from, reason."""
    for name, rules in RULES.items():
        yield f"`{name}`", rules.resume.value, rules.init_from.value, rules.reason
