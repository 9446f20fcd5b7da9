"""Who of several processes is at work on what: a cell of a grid, or its data.

A claim is a folder, which only one of them can put there, and its owner touches it while it works.
It is taken over when its process is gone from this machine, when Slurm has requeued its job, or
when it was silent for `STALE_S` elsewhere.
"""

import glob
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xlstm_io.holder import Holder

STALE_S = 300.0
TOUCH_S = 20.0
_LOOK_S = 0.1


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


class Claim:
    """The right to work on something; a folder that only one can put there.

    Args:
        folder: the folder, made by the one who has the right.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ours = 0  # inode of the folder that we made

    def take(self) -> bool:
        """Whether the right is ours now: nobody had it, or who had it is gone."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self._make():
            return True
        found = self._inode()
        if found is None or not self._is_left():
            return False
        # Named by what was found left: who comes second finds that name in use, and does not put
        # aside the new claim of who came first.
        try:
            self.folder.rename(self.folder.with_name(f"{self.folder.name}.left-{found}"))
        except OSError:
            return False
        return self._make()

    def touch(self) -> None:
        """Say that we are at work, unless another has taken us to be gone."""
        if self._inode() == self._ours:
            with suppress(FileNotFoundError):
                os.utime(self.folder)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Touched by a thread while something is done that cannot touch it, and then released."""
        ended = threading.Event()

        def touch() -> None:
            while not ended.wait(TOUCH_S):
                self.touch()

        thread = threading.Thread(target=touch, name="claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.release()

    def release(self) -> None:
        """Give the right back, if it is still ours."""
        if self._inode() == self._ours:
            shutil.rmtree(self.folder, ignore_errors=True)
            for left in self.folder.parent.glob(f"{glob.escape(self.folder.name)}.left-*"):
                shutil.rmtree(left, ignore_errors=True)

    def owner(self) -> str | None:
        """Who has the right, for messages; None for nobody."""
        found = read_json(self.folder / "owner.json")
        if found is None:
            return "somebody" if self.folder.exists() else None
        return f"process {found['pid']} on {found['host']}"

    def shows_life(self) -> bool:
        """Whether the owner is at work: waits for his next touch, or until he is gone."""
        first, end = self._touched(), time.monotonic() + STALE_S + TOUCH_S
        while first is not None and time.monotonic() < end:
            if (last := self._touched()) != first:
                return last is not None
            if self._is_left():
                return False
            time.sleep(_LOOK_S)
        return first is not None

    def _make(self) -> bool:
        # Named beside it first: a claim is never without its owner, whenever we are killed.
        unique = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        made = self.folder.with_name(f"{self.folder.name}.new-{unique}")
        made.mkdir()
        (made / "owner.json").write_text(json.dumps(asdict(Holder.here(0))))
        ours = made.stat().st_ino
        try:
            made.rename(self.folder)  # fails where the folder is there, since it is not empty
        except OSError:
            shutil.rmtree(made, ignore_errors=True)
            return False
        self._ours = ours
        return True

    def _inode(self) -> int | None:
        try:
            return self.folder.stat().st_ino
        except FileNotFoundError:
            return None

    def _touched(self) -> int | None:
        try:
            return self.folder.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _is_left(self) -> bool:
        touched = self._touched()
        if touched is None:
            return False  # given back just now; the next look takes it
        try:
            owner = Holder(**(read_json(self.folder / "owner.json") or {}))
        except TypeError:
            owner = None
        if owner is not None and Holder.here(0).sees(owner):
            return not owner.runs()
        if owner is not None and Holder.here(0).follows(owner):
            return True
        return time.time() - touched / 1e9 > STALE_S
