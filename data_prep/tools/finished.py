"""Whether a folder of shards is finished already, for the commands that make shards of shards."""

import json
from pathlib import Path
from typing import Any

from xlstm_io.errors import PrepError, ShardFormatError
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
    state = out / "_work" / state_name
    try:
        stored = json.loads(state.read_bytes())
    except FileNotFoundError:
        if out.exists() and any(out.iterdir()):
            raise PrepError(f"{out} was not made by this command; choose another --out") from None
        return False
    except ValueError:
        raise PrepError(f"{state} is damaged; delete {out} or choose another --out") from None
    if stored != identity:
        raise PrepError(f"{out} holds other shards or settings; choose another --out")
    try:
        load_manifest(out)
    except ShardFormatError:
        return False
    return True
