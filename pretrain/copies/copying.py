"""A checkpoint copied to another folder or to a URL, and read there once more.

The manifest comes last, so whoever looks meanwhile sees an unfinished attempt. What is compared is
what the target has stored: every file is read back and its hash held against the manifest.
"""

from tqdm import tqdm

from xlstm_io.checkpoint.evaluation import EVALUATION_NAME
from xlstm_io.checkpoint.manifest import (
    CHECKPOINTS_FOLDER,
    MANIFEST_NAME,
    parse_manifest,
    read_manifest,
    verify_hashes,
)
from xlstm_io.checkpoint.writer import discard_attempt
from xlstm_io.errors import CheckpointError
from xlstm_io.foreign.untrusted import LIMITS
from xlstm_io.storage import (
    Location,
    exists,
    is_folder,
    location,
    make_folder,
    open_file,
    read_file,
    sync_folder,
    write_atomic,
    writing,
)

PORTION = 16 << 20


def copy_checkpoint(source: Location, out: Location | str) -> Location:
    """Copy a checkpoint into the folder of checkpoints of a run folder.

    Args:
        source: its folder.
        out: the run folder, a path or an fsspec URL; it may hold other checkpoints.

    Returns:
        The copy's folder, whose name is that of the source.

    Raises:
        CheckpointError: it is there already, the source is damaged, or a folder cannot be read or
            written. What was copied is removed then.
    """
    manifest = read_manifest(source)
    target = location(out) / CHECKPOINTS_FOLDER / source.name
    try:
        if exists(target / MANIFEST_NAME):
            raise CheckpointError(f"{target} holds this checkpoint already; choose another folder")
        if is_folder(target):
            discard_attempt(target)  # cut short before
        make_folder(target)
        try:
            _copy_files(source, target, {name: one.size for name, one in manifest.files.items()})
            verify_hashes(target, manifest)
        except BaseException:
            discard_attempt(target)
            raise
        # As it is, byte for byte: evaluation.json names its checksum.
        for name in (MANIFEST_NAME, EVALUATION_NAME):
            if name == MANIFEST_NAME or exists(source / name):
                data = read_file(source / name, LIMITS.checkpoint_json)
                write_atomic(target / name, data, make_parents=False)
        sync_folder(target.parent)
        parse_manifest(target)
    except OSError as error:
        raise CheckpointError(f"copying {source} to {target} failed: {error}") from error
    return target


def _copy_files(source: Location, target: Location, sizes: dict[str, int]) -> None:
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, disable=None) as bar:
        for name in sizes:
            with open_file(source / name) as old, writing(target / name) as new:
                while portion := old.read(PORTION):
                    new.write(portion)
                    bar.update(len(portion))
