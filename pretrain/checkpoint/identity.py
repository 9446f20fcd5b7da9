"""Is this checkpoint one of the run that wants to continue from it?"""

from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.config.changes import Change, Rule, resume_changes, rules_of
from xlstm_io.errors import CheckpointError


def check_same_run(
    saved: Mapping[str, Any],
    run: Mapping[str, Any],
    *,
    path: object = "",
    accept: Sequence[str] = (),
) -> list[Change]:
    """Refuse a checkpoint of another model, data or tokenizer, showing each key that differs.

    Which keys may differ is one table, `pretrain.config.changes.RULES`.

    Args:
        saved: The resolved configuration of the checkpoint's run (nested mappings with a `model`
            section), together with `tokenizer` and `cursor` of its training state.
        run: The same of the run that wants to continue.
        path: The checkpoint, for the message.
        accept: Keys and sections that may differ: the run says that the change is meant.

    Returns:
        The changes that alter the result; the run says and records them.

    Raises:
        CheckpointError: Something else differs.
    """
    changes = resume_changes(saved, run)
    fixed = [change for change in changes if change.rule is Rule.FIXED]
    asked = [
        change
        for change in changes
        if change.rule is Rule.ASKED and not _is_in(change.name, accept)
    ]
    if fixed or asked:
        raise CheckpointError(_message(fixed, asked, path))
    return [change for change in changes if change.rule is not Rule.FREE]


def _message(fixed: list[Change], asked: list[Change], path: object) -> str:
    """What is said about differences that a resume does not allow, and the remedies that exist."""
    which = f"the checkpoint {path}" if path else "the checkpoint"
    lines = [f"  {change}" for change in (*fixed, *asked)]
    if not fixed:
        names = ",".join(change.name for change in asked)
        return "\n".join(
            [
                f"{which} belongs to another run; use another run.dir, set what differs back, or, "
                f"where the change is meant, continue with checkpoint.accept_changes={names}",
                *lines,
            ]
        )
    names = ", ".join(change.name for change in fixed)
    reasons = dict.fromkeys(rules.reason for c in fixed if (rules := rules_of(c.name)) is not None)
    return "\n".join(
        [
            f"{which} belongs to another run and cannot be loaded into this one: {names} "
            f"({'; '.join(reasons)}); use another run.dir, or set back what differs",
            *lines,
        ]
    )


def _is_in(name: str, keys: Sequence[str]) -> bool:
    """Whether a dotted name is one of `keys` or lies in a section that is."""
    return any(name == key or name.startswith(key + ".") for key in keys)
