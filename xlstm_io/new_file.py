"""A file that is written once and never replaced: of several processes that try, one succeeds."""

import errno
import os
import secrets
from pathlib import Path

from xlstm_io.storage import Location, exists, sync_folder, write_atomic


def create_new(path: Location, data: bytes) -> None:
    """Write a small file that is not there yet, at once with its content; its folder must exist.

    Of several processes that do so at the same moment, one succeeds. An object store is asked
    before it is written to, and can miss another one's file of that moment.

    Raises:
        FileExistsError: it is there.
    """
    if not isinstance(path, Path):
        if exists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        write_atomic(path, data)
        return
    # Threads, and processes of the same number in two containers, get names of their own too.
    temporary = path.with_name(f"{path.name}.tmp.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, never replaces
        except FileExistsError:
            # A network file system says so too where the answer to our own request was lost.
            if not _same(temporary, path):
                raise
        except OSError:  # a file system without hard links
            with open(path, "xb") as file:
                try:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                except BaseException:
                    path.unlink(missing_ok=True)  # half a record would be damage to everybody
                    raise
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _same(one: Path, other: Path) -> bool:
    """Whether two names are of one file; a name that is gone, or a link to nothing, is another."""
    try:
        return one.samefile(other)
    except FileNotFoundError:
        return False
