"""Opening a tokenizer by its file or folder, or from the bytes of its files."""

from collections.abc import Callable, Mapping

from xlstm_io.errors import TokenizerFileError
from xlstm_io.foreign.untrusted import LIMITS
from xlstm_io.storage import Location, exists, is_folder, location, read_file
from xlstm_io.tokenizer.base import (
    HF_CONFIG_NAME,
    HF_NAME,
    SENTENCEPIECE_NAME,
    SYMBOLS_NAME,
    Tokenizer,
)
from xlstm_io.tokenizer.symbols import SymbolsTokenizer


def open_tokenizer(path: str | Location) -> Tokenizer:
    """The tokenizer in a file (`.model`, `tokenizer.json`, `symbols.json`) or in a folder with one.

    Args:
        path: the file or folder, local or an fsspec URL; in a folder with several
            `tokenizer.model` is taken first.

    Raises:
        TokenizerFileError: there is none, or the file is not a tokenizer.
    """
    path = location(path)
    names = (SENTENCEPIECE_NAME, HF_NAME, SYMBOLS_NAME)
    try:
        if is_folder(path):
            path = next((path / name for name in names if exists(path / name)), path / names[0])
    except OSError as error:
        raise TokenizerFileError(str(error)) from error
    return tokenizer_from_files(read_tokenizer_files(path), path)


def read_tokenizer_files(path: Location) -> dict[str, bytes]:
    """The bytes of a tokenizer's files under the names with which they travel.

    Args:
        path: a SentencePiece model, a `tokenizer.json` with its `tokenizer_config.json` beside it,
            or a `symbols.json`.

    Raises:
        TokenizerFileError: one of them is not there, cannot be read, or is too large.
    """
    files = {SENTENCEPIECE_NAME: path}
    if path.name == SYMBOLS_NAME:
        files = {SYMBOLS_NAME: path}
    elif path.name.endswith(".json"):
        files = {HF_NAME: path, HF_CONFIG_NAME: path.parent / HF_CONFIG_NAME}
    try:
        return {name: read_file(file, LIMITS.tokenizer, links=True) for name, file in files.items()}
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise TokenizerFileError(reason) from error


def tokenizer_from_files(files: Mapping[str, bytes], path: Location) -> Tokenizer:
    """The tokenizer whose files have these bytes; a `tokenizer.model` is taken before a JSON.

    Args:
        files: bytes by name, as `read_tokenizer_files` returns them.
        path: where they come from, for messages.

    Raises:
        TokenizerFileError: they are not a tokenizer.
    """
    opens: Callable[[Location, Mapping[str, bytes]], Tokenizer]
    if SENTENCEPIECE_NAME in files:
        opens, kind = _open_sentencepiece, "a SentencePiece model"
    elif SYMBOLS_NAME in files:
        opens, kind = SymbolsTokenizer, "a list of symbols"
    else:
        opens, kind = _open_hugging_face, "a Hugging Face tokenizer"
    try:
        return opens(path, files)
    except Exception as error:  # tokenizers raises bare Exception
        why = "" if opens is _open_sentencepiece else f": {error}"
        raise TokenizerFileError(f"{path} is not {kind}{why}") from error


# Each library takes a moment to import: only the one that is needed is.


def _open_sentencepiece(path: Location, files: Mapping[str, bytes]) -> Tokenizer:
    from xlstm_io.tokenizer.sentencepiece_model import SentencePieceTokenizer

    return SentencePieceTokenizer(path, files)


def _open_hugging_face(path: Location, files: Mapping[str, bytes]) -> Tokenizer:
    from xlstm_io.tokenizer.hugging_face import HuggingFaceTokenizer

    return HuggingFaceTokenizer(path, files)
