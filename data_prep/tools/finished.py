"""Whether a folder of shards is finished already, for the commands beside `build` that make one."""

from pathlib import Path
from typing import Any

from xlstm_io.errors import PrepError, ShardFormatError
from xlstm_io.foreign.json_file import read_json
from xlstm_io.foreign.untrusted import LIMITS, inside
from xlstm_io.shards.manifest import load_manifest


def is_finished(out: Path, state_name: str, identity: dict[str, Any]) -> bool:
    """Whether `out` has a manifest, made by the same command of the same input and settings.

    Args:
        out: the folder.
        state_name: the command's file in `out/_work`, with the identity it was started with.
        identity: what shards depend on, as plain values.

    Raises:
        PrepError: the folder belongs to something else.
    """
    state = inside(out, f"_work/{state_name}", named_in=out, error=PrepError)
    remedy = f"delete {out} or choose another --out"
    try:
        stored = read_json(state, LIMITS.note, remedy=remedy, error=PrepError)
    except FileNotFoundError:
        if out.exists() and any(out.iterdir()):
            raise PrepError(f"{out} was not made by this command; choose another --out") from None
        return False
    if stored != identity:
        raise PrepError(f"{out} holds other shards or settings; choose another --out")
    try:
        load_manifest(out)
    except ShardFormatError:
        return False
    return True
