"""An object store for tests: what S3 has and no more, kept in a local folder.

Objects appear whole when they are closed. There is no rename, no copy, no append, no link, and
folders exist only as prefixes of objects. `objects:///tmp/x/run` lives in /tmp/x/run, so that
several processes can share it.
"""

import datetime
import io
import os
import shutil
from pathlib import Path

import fsspec
from fsspec.spec import AbstractFileSystem


class ObjectStore(AbstractFileSystem):
    protocol = "objects"
    cachable = False
    bytes_read = 0
    requests = 0  # that ask for something: listings, also for a file's size, and reads

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix("objects://").rstrip("/")

    def ls(self, path, detail=True, **kwargs):
        ObjectStore.requests += 1
        path = Path(self._strip_protocol(path))
        if path.is_file():
            entries = [path]
        elif path.is_dir():
            entries = [p for p in path.iterdir() if p.is_file() or any(p.rglob("*"))]
            entries = [p for p in entries if p.suffix != ".uploading"]
        else:
            raise FileNotFoundError(path)
        if not entries:
            raise FileNotFoundError(path)
        about = [
            {
                "name": str(p),
                "size": p.stat().st_size if p.is_file() else 0,
                "type": "file" if p.is_file() else "directory",
            }
            for p in entries
        ]
        return about if detail else [entry["name"] for entry in about]

    def modified(self, path):
        return datetime.datetime.fromtimestamp(os.stat(self._strip_protocol(path)).st_mtime)

    def cat_file(self, path, start=None, end=None, **kwargs):
        ObjectStore.requests += 1
        with open(self._strip_protocol(path), "rb") as file:
            file.seek(start or 0)
            data = file.read(-1 if end is None else end - (start or 0))
        ObjectStore.bytes_read += len(data)
        return data

    def _open(self, path, mode="rb", **kwargs):
        if mode == "wb":
            return _Upload(Path(self._strip_protocol(path)))
        if mode == "rb":
            return io.BytesIO(self.cat_file(path))
        raise NotImplementedError(f"objects cannot be opened with {mode}")

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        with self._open(path, "wb") as file:
            file.write(value)

    def rm_file(self, path):
        os.unlink(self._strip_protocol(path))

    def rm(self, path, recursive=False, maxdepth=None):
        path = Path(self._strip_protocol(path))
        if path.is_dir():
            assert recursive
            shutil.rmtree(path)
        else:
            path.unlink()

    def mkdir(self, path, create_parents=True, **kwargs):
        """Nothing: there are no folders."""

    def makedirs(self, path, exist_ok=False):
        """Nothing: there are no folders."""

    def _refuse(self, *args, **kwargs):
        raise NotImplementedError("object stores have none of this")

    mv = move = rename = cp_file = copy = touch = link = _refuse


class _Upload(io.BytesIO):
    """Invisible until it is closed."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def close(self):
        if not self.closed:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            hidden = self.path.with_suffix(f".{os.getpid()}.uploading")
            hidden.write_bytes(self.getvalue())
            os.replace(hidden, self.path)
        super().close()


def register() -> None:
    """Make `objects://` known to fsspec in this process."""
    fsspec.register_implementation("objects", ObjectStore, clobber=True)
