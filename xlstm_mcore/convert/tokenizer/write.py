"""The tokenizer of an export: its own files, and what makes `AutoTokenizer` give the same ids.

Each way is tried on the texts of `corpus`, best first, and the first that is exact is
taken. So no export has a tokenizer that gives other ids than training.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2 as model_pb2
from transformers import AutoTokenizer

import xlstm_mcore.hf
from xlstm_io.tokenizer import Tokenizer
from xlstm_io.tokenizer.base import HF_CONFIG_NAME
from xlstm_io.tokenizer.sentencepiece_model import SPACE_SYMBOL, SentencePieceTokenizer
from xlstm_mcore.convert.errors import ConvertError
from xlstm_mcore.convert.tokenizer import corpus
from xlstm_mcore.convert.tokenizer.sentencepiece_fast import fast_tokenizer

WRAPPER = "tokenization_xlstm_blocks.py"
_WRAPPER_CLASS = "XLSTMSentencePieceTokenizer"

SPELLED_OUT = (
    "Special tokens that a text spells out are text, as in training "
    "(`split_special_tokens=False` finds them)."
)


@dataclass(frozen=True)
class WrittenTokenizer:
    """How the tokenizer of an export is used.

    Attributes:
        auto: Whether AutoTokenizer gives the ids of training.
        remote_code: Whether AutoTokenizer needs a class that travels with the export.
        bos_first: Whether it puts the bos token in front, as training documents begin.
        notes: What a user should know, one sentence each.
    """

    auto: bool
    remote_code: bool
    bos_first: bool
    notes: tuple[str, ...]


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> WrittenTokenizer:
    """Write the tokenizer's files as they are, and what AutoTokenizer needs beside them."""
    for name, data in tokenizer.files.items():
        (folder / name).write_bytes(data)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _write_sentencepiece(tokenizer, folder)
    return _write_hugging_face(tokenizer, folder)


def texts_for(tokenizer: Tokenizer) -> list[str]:
    """The texts that a tokenizer's exports are compared on."""
    special: list[str] = []
    if isinstance(tokenizer, SentencePieceTokenizer):
        kinds = model_pb2.ModelProto.SentencePiece
        ordinary = (kinds.NORMAL, kinds.USER_DEFINED)
        pieces = [p.piece for p in tokenizer.proto.pieces if p.type in ordinary]
        pieces = [piece.replace(SPACE_SYMBOL, " ") for piece in pieces]
        special = [p.piece for p in tokenizer.proto.pieces if p.type not in ordinary]
    else:
        pieces = [tokenizer.decode([index]) for index in range(tokenizer.vocab_size)]
        added = json.loads(next(iter(tokenizer.files.values()))).get("added_tokens", ())
        special = [token["content"] for token in added]
    return corpus.corpus(pieces, special, corpus.TEXTS)


def check_folder(folder: Path, tokenizer: Tokenizer, *, remote_code: bool) -> bool:
    """Compare what AutoTokenizer makes of a folder with the tokenizer of training.

    Args:
        folder: The export.
        tokenizer: The tokenizer of training.
        remote_code: Whether the class that travels with the export is needed.

    Returns:
        Whether it puts the bos token in front.

    Raises:
        ConvertError: It gives other ids, or transformers cannot load it.
    """
    with tempfile.TemporaryDirectory() as alone:  # a config.json would suggest another class
        for name in (*tokenizer.files, "tokenizer.json", "special_tokens_map.json", HF_CONFIG_NAME):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(alone) / name)
        if (folder / "config.json").is_file():
            shutil.copyfile(folder / "config.json", Path(alone) / "config.json")
        try:
            if remote_code:  # the same file as the one that travels, already imported
                found = xlstm_mcore.hf.XLSTMSentencePieceTokenizer.from_pretrained(alone)
            else:
                found = AutoTokenizer.from_pretrained(alone, trust_remote_code=False)
            return corpus.check_equal(found, tokenizer, texts_for(tokenizer))
        except ConvertError:
            raise
        except Exception as error:  # whatever a class of transformers may raise
            raise ConvertError(f"transformers cannot load it: {error}") from error


def _write_sentencepiece(tokenizer: SentencePieceTokenizer, folder: Path) -> WrittenTokenizer:
    """The fast form of a SentencePiece model where it is exact, else the class that wraps it."""
    try:
        fast_tokenizer(tokenizer).save_pretrained(folder)
        bos_first = check_folder(folder, tokenizer, remote_code=False)
        return WrittenTokenizer(True, False, bos_first, (SPELLED_OUT,))
    except ConvertError as error:
        reason = str(error)
    for name in ("tokenizer.json", "special_tokens_map.json", HF_CONFIG_NAME):
        (folder / name).unlink(missing_ok=True)
    module = WRAPPER.removesuffix(".py")
    names = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    config = {
        "tokenizer_class": _WRAPPER_CLASS,
        "auto_map": {"AutoTokenizer": [f"{module}.{_WRAPPER_CLASS}", None]},
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        **{
            f"{name}_token": tokenizer.proto.pieces[index].piece
            for name, index in names.items()
            if index is not None
        },
    }
    (folder / HF_CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
    shutil.copyfile(Path(xlstm_mcore.hf.__file__).parent / WRAPPER, folder / WRAPPER)
    bos_first = check_folder(folder, tokenizer, remote_code=True)
    note = (
        f"The tokenizer is SentencePiece itself, behind a class in this folder ({reason}, so it "
        "has no exact fast form)."
    )
    return WrittenTokenizer(True, True, bos_first, (note, SPELLED_OUT))


def _write_hugging_face(tokenizer: Tokenizer, folder: Path) -> WrittenTokenizer:
    """A Hugging Face tokenizer with what makes AutoTokenizer split special tokens, as training did.

    A class of transformers may change what tokenizer.json says. Then the plain class is named.
    """
    config = json.loads((folder / HF_CONFIG_NAME).read_text(encoding="utf-8"))
    reason = ""
    for changes in ({}, {"tokenizer_class": "PreTrainedTokenizerFast"}):
        changed = {**config, "split_special_tokens": True, **changes}
        if changes:
            changed.pop("add_prefix_space", None)
        (folder / HF_CONFIG_NAME).write_text(json.dumps(changed, indent=2), encoding="utf-8")
        try:
            bos_first = check_folder(folder, tokenizer, remote_code=False)
            return WrittenTokenizer(True, False, bos_first, (SPELLED_OUT,))
        except ConvertError as error:
            reason = reason or str(error)
    (folder / HF_CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
    note = f"AutoTokenizer is not the trained tokenizer ({reason}); use tokenizers' own, as above."
    return WrittenTokenizer(False, False, False, (note,))
