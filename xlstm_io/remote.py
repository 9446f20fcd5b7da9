"""fsspec behind one door: what counts as a URL, which file system it means, one kind of error.

    folder = RemotePath("s3://bucket/run")
    with os_errors(folder):
        names = folder.fs.ls(folder.key)

fsspec is imported when the first URL is opened, because its import takes a sixth of the start of a
data preparation worker.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from xlstm_io.errors import UserError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::.*)?://")


def is_remote(path: str | os.PathLike[str] | RemotePath) -> bool:
    """Whether a path is a URL that fsspec opens, such as `s3://b/k` or `zip://*::a.zip`."""
    return isinstance(path, RemotePath) or _URL.match(os.fspath(path)) is not None


_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/@\s'\"]+@")
_KEY = re.compile(
    r"([?&;][^=&#\s]*(?:key|token|secret|sig|signature|password|credential|auth)[^=&#\s]*=)[^&#\s'\"]+",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """A text in which URLs have no credentials: `s3://***@bucket/x`, `https://h/x?token=***`."""
    if "://" not in text:
        return text
    return _KEY.sub(r"\1***", _USER.sub(r"\1***@", text))


def masked_values(value: Any) -> Any:
    """Values of JSON in which every text is `masked`."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        return {key: masked_values(item) for key, item in value.items()}
    return type(value)(map(masked_values, value)) if type(value) in (list, tuple) else value


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the name of the file in it.

    fsspec gives a forked process file systems of its own.
    """
    first, _, archive = url.partition("::")
    protocol, separator, name = first.partition("://")
    if not archive or not separator:
        return _url_to_fs(url)
    return _archive(os.getpid(), protocol, archive), name


def _url_to_fs(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    return url_to_fs(url)


@lru_cache(maxsize=16)
def _archive(process: int, protocol: str, archive: str) -> Any:
    """A file system inside a file, kept: it closes its open files when it is dropped."""
    return _url_to_fs(f"{protocol}://::{archive}")[0]


@contextmanager
def os_errors(path: object) -> Iterator[None]:
    """Turn what a backend raises (errors of boto, of http clients) into an OSError.

    An OSError and a UserError stay as they are. Any other error becomes an OSError that begins
    with `path: `, and says so where a package must be installed first.
    """
    try:
        yield
    except (OSError, UserError):
        raise
    except ImportError as error:
        raise OSError(f"{path}: {error}") from error
    except ValueError as error:
        if "not known" not in str(error):
            raise OSError(f"{path}: {type(error).__name__}: {error}") from error
        raise OSError(f"{path}: {error}; install its fsspec package") from error
    except Exception as error:
        raise OSError(f"{path}: {type(error).__name__}: {error}") from error


class RemotePath:
    """A folder or file at an fsspec URL, with the few parts of `pathlib.Path` that we use."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._opened: tuple[int, Any, str] | None = None

    def _open(self) -> tuple[int, Any, str]:
        """The process that opened the file system, the file system, and the path in it."""
        if self._opened is None or self._opened[0] != os.getpid():
            with os_errors(self):
                self._opened = (os.getpid(), *file_system(self._url))
        return self._opened

    @property
    def fs(self) -> Any:
        """The fsspec file system; OSError if its package is missing or it refuses the URL."""
        return self._open()[1]

    @property
    def key(self) -> str:
        """The path as the file system itself names it."""
        return self._open()[2].rstrip("/")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self._url.partition("://")[2]).name

    @property
    def parent(self) -> RemotePath:
        """The folder that holds it."""
        return RemotePath(self._url.rpartition("/")[0])

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self._url}/{name}")

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"RemotePath({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and other._url == self._url

    def __lt__(self, other: RemotePath) -> bool:
        return self._url < other._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __reduce__(self) -> tuple[type[RemotePath], tuple[str]]:
        return RemotePath, (self._url,)
