"""The checkpoint format: what lies in a folder, its manifest, and finding complete ones.

A checkpoint is a folder `step-00000200-<attempt id>`:

    data-00000.safetensors ...   one file per saving rank; a stored slice of a global tensor has
                                 the key `<name>@<offset>,<offset>...`
    metadata.json                {"tensors": {name: [[offset, shape, file, begin, xxh3], ...]}}:
                                 where the bytes of each stored slice lie, and their hash
    manifest.json                written last: sizes and hashes of the files, the global tensors,
                                 training state, config, versions, `complete: true`
    evaluation.json              the validation loss, once it is measured; see
                                 `xlstm_io.checkpoint.evaluation`

Readers trust only a manifest that is complete, has the right checksum, and whose files have the
sizes it says. A folder without a manifest is an attempt that was cut short, or one that is still
being written.

Loading a stranger's checkpoint executes no code. The JSON files are parsed as JSON, with a limit on
their size, and of the data files only the byte ranges that the metadata names are read. Nothing is
unpickled, and no header of a data file is parsed.

This module needs neither the trainer nor torch.distributed, so that conversion and evaluation of a
checkpoint work in one plain process. `pretrain.checkpoint` writes checkpoints.
"""

import errno
import json
import logging
import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from xlstm_io.checkpoint.lives import CHECKPOINTS_FOLDER, Lives
from xlstm_io.checkpoint.safetensors_stream import DTYPES, WrittenFile, hash_file
from xlstm_io.checkpoint.schema import ManifestBody
from xlstm_io.errors import CheckpointDamagedError, CheckpointError, UnfinishedError
from xlstm_io.foreign.json_file import checked, parse_json
from xlstm_io.foreign.untrusted import LIMITS, check_name
from xlstm_io.storage import (
    Location,
    exists,
    file_size,
    is_folder,
    listed_sizes,
    location,
    read_file,
)
from xlstm_io.storage import subfolders as list_subfolders
from xlstm_io.terminal import shortened

FORMAT = "xlstm-pretrain checkpoint"
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
METADATA_NAME = "metadata.json"
OPTIMIZER_PREFIX = "optimizer."
_REMEDY = "use another copy of this checkpoint, or another checkpoint"
_STEP_FOLDER = re.compile(r"step-(\d{8,18})-[\w.]+")
_FILE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a global tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        step: Training steps done.
        created: When it was written, in seconds since 1970.
        files: Every other file of the checkpoint, by name.
        tensors: The global tensors, by name.
        state: The training state, as JSON with the values of `xlstm_io.checkpoint.schema.State`.
        config: The run's configuration, as JSON that `pretrain.config` checks.
        versions: Versions of the programs that wrote it, by name.
        checksum: xxh3-64 of the manifest; see `manifest_checksum`.
    """

    step: int
    created: float
    files: dict[str, WrittenFile]
    tensors: dict[str, TensorInfo]
    state: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]
    checksum: str


def step_folder_name(step: int, attempt: str) -> str:
    """Folder of one attempt to save `step`; names sort by step."""
    return f"step-{step:08d}-{attempt}"


def step_of_folder(path: Location) -> int:
    """The step that a checkpoint folder's name says."""
    match = _STEP_FOLDER.fullmatch(path.name)
    assert match, path
    return int(match[1])


def is_weight(name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to the model (and not to the optimizer)."""
    return not name.startswith(OPTIMIZER_PREFIX)


def manifest_checksum(body: dict) -> str:
    """xxh3-64 of the manifest without its own `checksum` key, in canonical JSON."""
    rest = {key: value for key, value in body.items() if key != "checksum"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_64(canonical.encode()).hexdigest()


@contextmanager
def _os_errors_explained() -> Iterator[None]:
    """Turn what the file system refuses into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(str(error)) from error


def read_manifest(path: Location | str, *, check_files: bool = True) -> Manifest:
    """Read and check the manifest of the checkpoint folder `path`, and its files' sizes.

    Raises:
        CheckpointDamagedError: a file is missing, cut short or altered; the message says which.
        CheckpointError: another version of the format, or the file system refuses to read.
    """
    with _os_errors_explained():
        return parse_manifest(path, check_files=check_files)


def parse_manifest(path: Location | str, *, check_files: bool = True) -> Manifest:
    """`read_manifest` that leaves an OSError as it is.

    A checkpoint that cannot be read just now is not a damaged one. Where storage does not answer, a
    search for the newest sound checkpoint must end and not pass it over.
    """
    path = location(path)
    file = path / MANIFEST_NAME
    try:
        body = read_json(file)
    except FileNotFoundError as error:
        raise UnfinishedError(f"{path} has no {MANIFEST_NAME}: it was never completed") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointDamagedError(f"{file} is not the manifest of a checkpoint")
    if body.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format version {shortened(body.get('format_version'))}, this "
            f"program reads version {FORMAT_VERSION}; use the version of the program that wrote it"
        )
    try:
        whole = body.get("complete") is True and body.get("checksum") == manifest_checksum(body)
    except RecursionError:
        whole = False
    if not whole:
        raise CheckpointDamagedError(f"{file} is incomplete or was altered")
    said = checked(ManifestBody, body, named_in=file, remedy=_REMEDY, error=CheckpointDamagedError)
    manifest = Manifest(
        step=said.step,
        created=said.created,
        files={name: WrittenFile(entry.size, entry.xxh3) for name, entry in said.files.items()},
        tensors={
            name: TensorInfo(tuple(entry.shape), DTYPES[entry.dtype])
            for name, entry in said.tensors.items()
        },
        state=body["state"],
        config=said.config,
        versions=said.versions,
        checksum=said.checksum,
    )
    for name in manifest.files:
        check_name(name, named_in=file, error=CheckpointDamagedError)
        if not _FILE_NAME.fullmatch(name):  # stricter: a checkpoint has no folders in it
            raise CheckpointDamagedError(f"{file} names a file outside its folder: {name!r}")
    if check_files:
        check_sizes(path, manifest.files)
    return manifest


def check_sizes(
    path: Location,
    files: Mapping[str, WrittenFile],
    listed: Mapping[str, int | None] | None = None,
) -> None:
    """Compare the sizes of a checkpoint's files with what was written.

    Args:
        path: the checkpoint's folder.
        files: what was written.
        listed: sizes from a listing of the folder, which is made here if there is none yet. Any
            that is not right is asked for again.

    Raises:
        CheckpointDamagedError: a size differs, or a file is missing.
    """
    listed = listed_sizes(path) if listed is None else listed
    for name, expected in files.items():
        if listed.get(name) != expected.size:
            check_size(path / name, expected)


def check_size(path: Location, expected: WrittenFile) -> None:
    """Compare a file's size with what was written.

    Raises:
        CheckpointDamagedError: it differs, or the file is missing.
    """
    try:
        size = file_size(path)
    except FileNotFoundError as error:
        raise CheckpointDamagedError(f"{path} is missing") from error
    if size != expected.size:
        raise CheckpointDamagedError(f"{path} has {size} bytes, the manifest says {expected.size}")


def verify_hashes(path: Location | str, manifest: Manifest) -> None:
    """Read every file of a checkpoint; CheckpointDamagedError names the first one that changed."""
    for name, expected in manifest.files.items():
        if hash_file(location(path) / name) != expected:
            raise CheckpointDamagedError(
                f"{location(path) / name} does not match its hash in the manifest: it is corrupted"
            )


def read_json(path: Location) -> Any:
    """Parse a JSON file; OSError if it cannot be read, CheckpointDamagedError if it is not JSON."""
    try:
        return parse_json(read_file(path, LIMITS.checkpoint_json))
    except ValueError as error:
        raise CheckpointDamagedError(f"{path} is not JSON: {error}") from None


def checkpoints_folder(root: Location | str) -> Location:
    """The folder that holds the step folders: `root` itself, or its `checkpoints` folder."""
    root = location(root)
    return root / CHECKPOINTS_FOLDER if is_folder(root / CHECKPOINTS_FOLDER) else root


def step_folders(root: Location | str) -> list[Location]:
    """All checkpoint folders under a run folder or a `checkpoints` folder, whatever their state."""
    folder = checkpoints_folder(root)
    return [path for path in list_subfolders(folder) if _STEP_FOLDER.fullmatch(path.name)]


def newest_first(
    root: Location | str,
    broken: list[CheckpointError],
    *,
    steps: Container[int] | None = None,
    check_files: bool = True,
) -> Iterator[Location]:
    """The complete checkpoints under `root`, newest first, reading no more than is asked for.

    Newest is the highest step, and among attempts at the same step the last one written. What is
    wrong with those that are passed over is appended to `broken`. A checkpoint of a life of the run
    that had been superseded is passed over like a broken one; see `xlstm_io.checkpoint.lives`. So
    is one that only this process cannot read: a run that goes on from an older one supersedes it.

    Args:
        root: A run folder or a `checkpoints` folder.
        broken: Gets what is wrong.
        steps: Only checkpoints of these steps; None for all.
        check_files: Whether the files of a checkpoint must have their sizes. There is one for each
            rank, so where many checkpoints are gone through that takes long.

    Raises:
        CheckpointError: the record of a life is damaged, which is the fault of no checkpoint.
        OSError: the folder cannot be read, or its storage does not answer.
    """
    lives = Lives(checkpoints_folder(root))
    by_step: dict[int, list[Location]] = {}
    for path in step_folders(root):
        if steps is None or step_of_folder(path) in steps:
            by_step.setdefault(step_of_folder(path), []).append(path)
    for step in sorted(by_step, reverse=True):
        found = []
        for path in by_step[step]:
            try:
                manifest = parse_manifest(path, check_files=check_files)
                if manifest.step != step:
                    raise CheckpointDamagedError(f"{path}: the manifest says step {manifest.step}")
            except CheckpointError as error:
                broken.append(error)
                continue
            except OSError as error:
                if not is_unreadable(error):
                    raise
                broken.append(CheckpointError(f"{path} cannot be read: {error}"))
                continue
            life = manifest.state.get("life", 0)
            later = lives.superseded_by(life, step)
            if later is None:
                found.append((manifest.created, path))
                continue
            broken.append(
                CheckpointError(
                    f"{path} of life {life} does not count: life {later} of the run went on from "
                    "an earlier step"
                )
            )
        yield from (path for _, path in sorted(found, reverse=True))


def is_unreadable(error: OSError) -> bool:
    """Whether one file cannot be read, as opposed to storage that does not answer."""
    return error.errno in (errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP)


def find_latest(root: Location | str, *, verify: bool = False) -> Location | None:
    """The newest complete checkpoint under a run folder or `checkpoints` folder, or None.

    A broken one is named in a warning and passed over; nothing is deleted. `verify=True` also reads
    the files and compares their hashes. For one process: ranks that must agree use
    `pretrain.checkpoint.Candidates`.

    Raises:
        CheckpointError: the file system refuses to read.
    """
    broken: list[CheckpointError] = []
    latest = None
    with _os_errors_explained():
        for path in newest_first(root, broken):
            try:
                if verify:
                    verify_hashes(path, parse_manifest(path))
                latest = path
                break
            except CheckpointDamagedError as error:
                broken.append(error)
    name_broken(broken)
    return latest


def name_broken(broken: list[CheckpointError]) -> None:
    """Warn about each checkpoint that is passed over."""
    for problem in broken:
        log.warning("passing over a checkpoint: %s", problem)


def resolve(path: Location | str) -> Location:
    """The checkpoint that `path` means: itself, or the newest of a run or `checkpoints` folder.

    `path` is local or an fsspec URL. Raises CheckpointError when there is none, with the
    reason.
    """
    path = location(path)
    try:
        return _resolve(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _resolve(path: Location) -> Location:
    if not is_folder(path):
        raise CheckpointError(f"{path}: no such folder; give a run folder or a checkpoint")
    if exists(path / MANIFEST_NAME) or _STEP_FOLDER.fullmatch(path.name):
        parse_manifest(path)
        return path
    broken: list[CheckpointError] = []
    for latest in newest_first(path, broken):
        name_broken(broken)
        return latest
    reason = "; ".join(map(str, broken)) or f"it has no finished {step_folder_name(0, '<attempt>')}"
    raise CheckpointError(f"{path} holds no complete checkpoint: {reason}")
