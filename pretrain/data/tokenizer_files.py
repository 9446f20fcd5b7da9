"""The files of the tokenizer that made a run's ids; every checkpoint of the run holds a copy."""

import hashlib
import logging

from xlstm_io.errors import ShardFormatError, TokenizerFileError
from xlstm_io.shards.manifest import Manifest
from xlstm_io.tokenizer import read_tokenizer_files

log = logging.getLogger(__name__)


def tokenizer_files(manifest: Manifest) -> dict[str, bytes]:
    """Bytes by name of the tokenizer's files beside the shards.

    Training itself needs no tokenizer. So where the files are missing, or not those that made the
    shards, a warning says that checkpoints will not hold them, and the run goes on.

    Args:
        manifest: of the shards.

    Returns:
        The files as `xlstm_io.tokenizer.tokenizer_from_files` takes them, or none.
    """
    try:
        files = read_tokenizer_files(manifest.tokenizer_path)
    except (TokenizerFileError, ShardFormatError) as error:
        log.warning("checkpoints will not hold the tokenizer: %s", error)
        return {}
    if hashlib.sha256(next(iter(files.values()))).hexdigest() != manifest.tokenizer_sha256:
        log.warning(
            "checkpoints will not hold the tokenizer: %s is not the one that made the shards",
            manifest.tokenizer_path,
        )
        return {}
    return files
