"""Opening a tokenizer by its file or folder."""

from pathlib import Path

from xlstm_io.errors import TokenizerFileError
from xlstm_io.tokenizer.base import HF_NAME, SENTENCEPIECE_NAME, Tokenizer


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file (`.model`, `tokenizer.json`) or in a folder that has one.

    Args:
        path: the file or folder; in a folder with both files `tokenizer.model` is taken.

    Raises:
        TokenizerFileError: there is none, or the file is not a tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        names = (SENTENCEPIECE_NAME, HF_NAME)
        path = next((path / name for name in names if (path / name).is_file()), path / names[0])
    is_json = path.suffix == ".json"
    try:
        return _open_hugging_face(path) if is_json else _open_sentencepiece(path)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise TokenizerFileError(reason) from error
    except Exception as error:  # tokenizers raises bare Exception
        kind = f"a Hugging Face tokenizer: {error}" if is_json else "a SentencePiece model"
        raise TokenizerFileError(f"{path} is not {kind}") from error


# Each library takes a moment to import: only the one that is needed is.


def _open_sentencepiece(path: Path) -> Tokenizer:
    from xlstm_io.tokenizer.sentencepiece_model import SentencePieceTokenizer

    return SentencePieceTokenizer(path)


def _open_hugging_face(path: Path) -> Tokenizer:
    from xlstm_io.tokenizer.hugging_face import HuggingFaceTokenizer

    return HuggingFaceTokenizer(path)
