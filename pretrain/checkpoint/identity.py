"""Is this checkpoint one of the run that wants to continue from it?"""

from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.config.changes import Change, Rule, refused, resume_changes, rules_of
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
    wrong = refused(changes, accept)
    if wrong:
        raise CheckpointError(_message(wrong, path))
    return [change for change in changes if change.rule is not Rule.FREE]


def _message(wrong: list[Change], path: object) -> str:
    """What is said about differences that a resume does not allow, and the remedies that exist."""
    which = f"the checkpoint {path}" if path else "the checkpoint"
    fixed = [change for change in wrong if change.rule is Rule.FIXED]
    names = ",".join(change.name for change in wrong)
    told = (
        f"{which} belongs to another run; use another run.dir, set what differs back, or, "
        f"where the change is meant, continue with checkpoint.accept_changes={names}"
    )
    if fixed:
        names = ", ".join(change.name for change in fixed)
        rules = (rules_of(change.name) for change in fixed)
        reasons = dict.fromkeys(rule.reason for rule in rules if rule is not None)
        told = (
            f"{which} belongs to another run and cannot be loaded into this one: {names} "
            f"({'; '.join(reasons)}); use another run.dir, or set back what differs"
        )
    return "\n".join([told, *(f"  {change}" for change in wrong)])
