"""Input files by local path or URL: finding and fingerprinting them, and the notes beside them.

A local file is named by its plain path, anything else by an fsspec URL (`s3://bucket/a.jsonl.zst`,
`memory://a.txt`, `zip://*.jsonl::archive.zip`); the protocol's own package must be installed.
"""

import codecs
import glob
import os
import posixpath
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from data_prep.jobs.progress import say
from data_prep.sources.names import (
    COMPRESSION_SUFFIXES,
    JSON_SUFFIXES,
    REFUSED_SUFFIXES,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    base_name,
    suffixes,
)
from data_prep.sources.streams import errors_of
from xlstm_io.errors import PrepError
from xlstm_io.field_errors import key_of, rule_of
from xlstm_io.foreign.json_file import parse_json
from xlstm_io.foreign.untrusted import LIMITS
from xlstm_io.remote import file_system, is_remote, masked
from xlstm_io.storage import location, read_file
from xlstm_io.terminal import counted

PROVENANCE_NAME = "SOURCE.json"
"""Licence and origin of the files beside it; never read as documents."""

# What Hugging Face datasets keeps beside the rows of a dataset saved to disk.
_DATASET_STATE, _DATASET_INFO = "state.json", "dataset_info.json"
_DATASET_DICT = "dataset_dict.json"
# What file systems of fsspec call that which changes with the contents.
_CHANGE_TAGS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "mtime", "LastModified"),
    *("Last-Modified", "last_modified", "created", "CRC"),
)


_BESIDE = {PROVENANCE_NAME, _DATASET_STATE, _DATASET_INFO, _DATASET_DICT}


def _readable(path: str) -> bool:
    known = JSON_SUFFIXES | TEXT_SUFFIXES | TABLE_SUFFIXES
    return suffixes(path)[0] in known and base_name(path) not in _BESIDE


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))


def expand_inputs(patterns: list[str]) -> list[str]:
    """Files that paths, folders, globs and URLs stand for: sorted, each once.

    A folder stands for the files below it with a known suffix, and a line says how many others
    there are; a file named directly or by a glob is taken whatever its suffix (an unknown one is
    read as text).

    Raises:
        PrepError: a pattern that stands for nothing, or only for empty files, or for tables of
            text.
    """
    found: set[str] = set()
    for pattern in patterns:
        expand = _expand_remote if is_remote(pattern) else _expand_local
        files, others = expand(pattern)
        left_out = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common(8) if n)
        if not files:
            known = ", ".join(sorted(JSON_SUFFIXES | TABLE_SUFFIXES))
            raise PrepError(
                f"--input {pattern}: no readable file (wanted: {known}, text, code, also with "
                f"{', '.join(COMPRESSION_SUFFIXES)}; there are: {left_out or 'none'}); name other "
                "text files by a glob, for example 'folder/**/*.log'"
            )
        if left_out:
            say(f"{pattern}: left out: {left_out}; name them by a glob to read them")
        for file in files:
            _refuse_table_of_text(file)
        if not any(file_size(file) for file in files):
            raise PrepError(f"--input {pattern}: empty ({counted(len(files), 'file')} of 0 bytes)")
        found.update(files)
    # By parts, as in a walk through the folders: "a/b.txt" before "a.txt".
    return sorted(found, key=lambda path: path.split("/"))


def _refuse_table_of_text(file: str) -> None:
    suffix = suffixes(file)[0]
    if suffix in REFUSED_SUFFIXES:
        raise PrepError(
            f"--input {file}: {suffix} is not read, because what is one text in it depends on how "
            'it was written; make a parquet table of it, for example by `python -c "import sys; '
            "from pyarrow import csv, parquet; parquet.write_table(csv.read_csv(sys.argv[1], "
            f"parse_options=csv.ParseOptions(delimiter='{REFUSED_SUFFIXES[suffix]}', "
            f"newlines_in_values=True)), 'corpus.parquet')\" {base_name(file)}`"
        )


def _nothing(pattern: str) -> PrepError:
    return PrepError(f"--input {pattern}: no such file or folder, and no file matches it")


def _expand_local(pattern: str) -> tuple[list[str], Counter[str]]:
    """The files, and how many of its folders' files are left out, by suffix."""
    path = Path(pattern).expanduser()
    names = [path] if path.exists() else [Path(p) for p in glob.glob(str(path), recursive=True)]
    if not names:
        raise _nothing(pattern)
    files: list[str] = []
    others: Counter[str] = Counter()
    for name in sorted(names):
        if name.is_dir():
            found = list(name.rglob("*"))
            below = [p.relative_to(name).as_posix() for p in found if p.is_file()]
            chosen, left_out = _files_of_folder(below, _reader_of(name))
            files += (str(name / part) for part in chosen)
            others += left_out
            # They are not followed, since they may lead into a circle.
            others["links to folders"] += sum(p.is_symlink() and p.is_dir() for p in found)
        elif not name.is_file():
            raise PrepError(
                f"--input {name}: a pipe or device, not a file; a corpus is read twice, so write "
                "it to a file"
            )
        elif name.name != PROVENANCE_NAME:
            files.append(str(name))
    return files, others


def _reader_of(folder: Path) -> Callable[[str], bytes]:
    return lambda part: _small_file(str(folder / part))


def _expand_remote(pattern: str) -> tuple[list[str], Counter[str]]:
    others: Counter[str] = Counter()
    first, *rest = pattern.split("::")
    protocol = first.partition("://")[0]

    def whole(name: str) -> str:
        return "::".join([name if "://" in name else f"{protocol}://{name}", *rest])

    with errors_of(pattern):
        fs, path = file_system(pattern)
        if glob.has_magic(path):
            # With the details, because asking for each name would be a request for each.
            found = fs.glob(path, detail=True)
            names = [name for name, about in found.items() if about["type"] != "directory"]
            if not names:
                raise _nothing(pattern)
        elif fs.isdir(path):
            root = path.rstrip("/")
            below = [name[len(root) :].lstrip("/") for name in fs.find(root)]
            chosen, others = _files_of_folder(
                below, lambda part: _small_file(whole(f"{root}/{part}"))
            )
            names = [f"{root}/{part}" for part in chosen]
        else:
            names = [path] if fs.exists(path) else []
            if not names:
                raise _nothing(pattern)
    files = [whole(name) for name in names if base_name(name) != PROVENANCE_NAME]
    return files, others


def _files_of_folder(
    below: list[str], read: Callable[[str], bytes]
) -> tuple[list[str], Counter[str]]:
    """The files to read among those `below` a folder (relative), and the others' suffixes.

    Args:
        below: names of all files.
        read: gives the bytes of one.

    Raises:
        PrepError: a Hugging Face dataset of several splits, of which one must be chosen.
    """
    present = set(below)
    unwanted: set[str] = set()
    for part in below:
        folder, _, name = part.rpartition("/")
        where = f"{folder}/" if folder else ""
        if name == _DATASET_DICT:
            splits = _about_dataset(part, read, _SplitNames).splits
            raise PrepError(
                f"--input: {where or 'this folder'} is a Hugging Face dataset with the splits "
                f"{', '.join(splits)}; name the folder of one"
            )
        if name == _DATASET_STATE and f"{where}{_DATASET_INFO}" in present:
            state = _about_dataset(part, read, _DatasetState)
            if state.indices_files or state.indices_data_files:
                raise PrepError(
                    f"--input: {where or 'this folder'} is a Hugging Face dataset saved with a "
                    "selection of its rows; save it again after flatten_indices()"
                )
            own = {f"{where}{item.filename}" for item in state.data_files}
            near = {p for p in below if p.startswith(where) and "/" not in p[len(where) :]}
            unwanted |= {p for p in near if p.endswith(".arrow")} - own  # caches of map and filter
    shown = [part for part in below if part not in unwanted and not _hidden(part)]
    others = Counter(
        "".join(suffixes(part)) or "without a suffix"
        for part in shown
        if not _readable(part) and base_name(part) not in _BESIDE
    )
    return sorted(filter(_readable, shown)), others


class _SplitNames(BaseModel):
    """`dataset_dict.json` of Hugging Face datasets."""

    splits: list[str]


class _DataFile(BaseModel):
    filename: str


class _DatasetState(BaseModel):
    """`state.json` of Hugging Face datasets."""

    data_files: list[_DataFile] = Field(alias="_data_files")
    indices_files: list[Any] | None = Field(None, alias="_indices_files")
    indices_data_files: list[Any] | None = Field(None, alias="_indices_data_files")


_AboutDataset = TypeVar("_AboutDataset", bound=BaseModel)


def _about_dataset(
    part: str, read: Callable[[str], bytes], kind: type[_AboutDataset]
) -> _AboutDataset:
    try:
        return kind.model_validate_json(read(part))
    except ValidationError as error:
        first = error.errors()[0]
        raise PrepError(
            f"--input: {part} is not what Hugging Face datasets writes "
            f"({key_of(first['loc'])} {rule_of(first)}); name the files beside it by a glob"
        ) from None


def file_size(path: str) -> int:
    """Bytes of a file as stored (0 where a server does not say)."""
    if not is_remote(path):
        return os.stat(path).st_size
    with errors_of(path):
        fs, name = file_system(path)
        return fs.info(name).get("size") or 0


def file_fingerprint(path: str) -> list[Any]:
    """What tells cheaply that a file is unchanged: path, size, modification time or tag.

    It is stored in files that others read, so a URL in it has no credentials. New credentials for
    the same file change nothing.
    """
    if not is_remote(path):
        stat = os.stat(path)
        return [os.path.realpath(path), stat.st_size, stat.st_mtime_ns]
    with errors_of(path):
        fs, name = file_system(path)
        info = fs.info(name)
        tag = next((str(info[tag]) for tag in _CHANGE_TAGS if tag in info), None)
        return [masked(path), info.get("size"), tag]


def provenance_notes(paths: list[str]) -> list[dict[str, Any]]:
    """The notes `SOURCE.json` beside the files: licence and origin.

    Raises:
        PrepError: a note is not JSON, is larger than such notes are, or is not a plain file.
    """
    notes = []
    for folder in sorted({_folder(path) for path in paths}):
        head, *rest = folder.split("::") if is_remote(folder) else [folder]
        file = "::".join([posixpath.join(head, PROVENANCE_NAME), *rest])
        if "://***@" in folder:  # as a stored state names it, when jobs are joined
            say(f"{file}: not read, since credentials are not stored; set `licence` and `origin`")
            continue
        try:
            raw = _small_file(file)
        except FileNotFoundError:
            continue
        try:
            note = parse_json(raw.removeprefix(codecs.BOM_UTF8))
        except ValueError as error:
            raise PrepError(f"{file}: not JSON ({error}); repair or remove it") from None
        notes.append(note if isinstance(note, dict) else {"note": note})
    return notes


def _small_file(path: str) -> bytes:
    """The bytes of a note; FileNotFoundError if it does not exist."""
    try:
        return read_file(location(path), LIMITS.note, links=True)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PrepError(f"{path}: cannot be read ({error.strerror or error})") from error


def _folder(path: str) -> str:
    head, *rest = path.split("::") if is_remote(path) else [path]
    return "::".join([posixpath.dirname(head), *rest])
