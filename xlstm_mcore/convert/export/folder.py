"""The folder of an export: what may be replaced, and how it appears whole or not at all.

A local folder is built beside its final place, as `.NAME.partial`, and renamed when it is complete.
A conversion that is killed leaves that folder, and the next one goes on there. Behind a URL nothing
can be renamed: there config.json is written last, and without it no program loads the folder.
"""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xlstm_io.storage import (
    Location,
    exists,
    files,
    make_folder,
    remove_file,
    sync_folder,
    write_atomic,
)
from xlstm_mcore.convert.errors import ConvertError
from xlstm_mcore.convert.export.weights import PROGRESS

#: Marks a folder as an export of ours, which a later export may replace.
MARKER = "xlstm_export.json"
_LOCK = ".lock"


def check_replaceable(out: Location) -> None:
    """Raise ConvertError if `out` exists and is neither empty nor an export, finished or not."""
    if not isinstance(out, Path):
        names = set(files(out))
        if names and not names & {MARKER, PROGRESS}:
            raise ConvertError(f"{out} has files and is not an earlier export; choose another one")
        return
    if out.is_dir() and ((out / MARKER).is_file() or not any(out.iterdir())):
        return
    if out.exists() or out.is_symlink():
        raise ConvertError(
            f"{out} exists and is not an earlier export (it has no {MARKER}); choose another folder"
        )


@contextmanager
def building(out: Location) -> Iterator[Location]:
    """The folder to write into; it becomes `out` when the block ends without an error.

    Args:
        out: The final place.

    Raises:
        ConvertError: Another conversion is writing there, or `out` must not be replaced.
    """
    check_replaceable(out)
    if not isinstance(out, Path):
        make_folder(out)
        if not exists(out / PROGRESS):
            write_atomic(out / PROGRESS, b"{}")
        for name in {"config.json", MARKER} & set(files(out)):  # of an earlier export
            remove_file(out / name)
        yield out
        remove_file(out / PROGRESS)
        return
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial / _LOCK, os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConvertError(f"another conversion is writing {out}; wait for it") from None
        try:
            yield partial
        except ConvertError:
            shutil.rmtree(partial)  # it would fail again
            raise
        for name in (_LOCK, PROGRESS):
            (partial / name).unlink(missing_ok=True)
        _move_into_place(partial, out)
    finally:
        os.close(lock)


def put_files(source: Path, folder: Location, *, keep: set[str]) -> None:
    """Copy the small files of an export into its folder, config.json and the marker last.

    Args:
        source: A local folder with the small files.
        folder: The export's folder.
        keep: Names of the files that are there already and belong to the export. All others are
            removed, because an earlier attempt or an earlier export left them.
    """
    names = sorted(path.name for path in source.iterdir())
    for name in sorted(set(files(folder)) - keep - {_LOCK, PROGRESS}):
        remove_file(folder / name)
    for name in sorted(names, key=lambda name: (name in (MARKER, "config.json"), name)):
        write_atomic(folder / name, (source / name).read_bytes())


def _move_into_place(partial: Path, out: Path) -> None:
    """Rename the folder. An earlier export is renamed first and removed afterwards."""
    check_replaceable(out)
    sync_folder(partial)
    if not out.exists():
        partial.rename(out)
    else:
        old = out.with_name(f".{out.name}.{secrets.token_hex(4)}.old")
        out.rename(old)
        try:
            partial.rename(out)
        except OSError:
            old.rename(out)
            raise
        shutil.rmtree(old)
    sync_folder(out.parent)
