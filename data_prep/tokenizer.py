"""SentencePiece tokenizers: train one, load one, encode without loss.

Text goes in and out unchanged: identity normalisation, no dummy prefix, no removal of spaces,
newline as a symbol of its own, bytes for what the vocabulary lacks. One character needs help:
SentencePiece writes a space as U+2581 and so reads a U+2581 of the text back as a space; it is
spelled in byte pieces here.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import re
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path

import sentencepiece as spm

from data_prep.errors import PrepError
from data_prep.progress import Progress, say
from data_prep.readers import Malformed, expand_inputs, read_documents
from data_prep.scan import file_stamp, text_hash
from data_prep.shards import write_atomic

MODEL_NAME = "tokenizer.model"
INFO_NAME = "tokenizer_info.json"
# The ids of the Hugging Face xlstm configuration's defaults.
BOS_ID, PAD_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
_SPACE_SYMBOL = "\u2581"
_TRAINER_THREADS = 2  # fixed: the sums of unigram training depend on the number of threads
_ROUND_TRIPS = 200
_LINE_BREAKS = re.compile("[\n\t]")  # the trainer skips whole lines that contain a tab


class Tokenizer:
    """A SentencePiece model file.

    Args:
        path: the ``.model`` file, or a folder with ``tokenizer.model``.

    Raises:
        PrepError: no such file, not a model, or a model without bos and eos.
    """

    def __init__(self, path: Path):
        path = Path(path)
        self.path = path / MODEL_NAME if path.is_dir() else path
        try:
            self.model = self.path.read_bytes()
        except OSError as error:
            raise PrepError(
                f"--tokenizer {path}: cannot read {self.path.name} ({error.strerror}); train one "
                "with `xlstm-data tokenizer` and give its --out folder"
            ) from None
        self.sha256 = hashlib.sha256(self.model).hexdigest()
        try:
            self._processor = spm.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError:
            raise PrepError(f"--tokenizer {self.path}: not a SentencePiece model") from None
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        pad_id = self._processor.pad_id()
        self.pad_id = self.eos_id if pad_id < 0 else pad_id  # masked everywhere: any id serves
        if min(self.bos_id, self.eos_id) < 0:
            raise PrepError(
                f"--tokenizer {self.path}: bos_id={self.bos_id}, eos_id={self.eos_id}, but "
                "documents are stored as [bos] tokens [eos]; use a model that defines both"
            )

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._processor.get_piece_size()

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without bos and eos."""
        encoded = self._processor.encode(texts, num_threads=1)
        for number, text in enumerate(texts):
            if _SPACE_SYMBOL in text:
                encoded[number] = self._encode_space_symbol(text)
        return encoded

    def decode(self, ids: list[int]) -> str:
        """The text of some ids; control ids (bos, eos, pad) give nothing."""
        return self._processor.decode(ids)

    @cached_property
    def _space_symbol_ids(self) -> list[int]:
        return [
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_SYMBOL.encode("utf-8")
        ]

    def _encode_space_symbol(self, text: str) -> list[int]:
        first, *rest = (self._processor.encode(part) for part in text.split(_SPACE_SYMBOL))
        for part in rest:
            first += self._space_symbol_ids
            first += part
        return first


@lru_cache(maxsize=1)
def cached_tokenizer(path: str, sha256: str) -> Tokenizer:
    """The tokenizer of a worker process, loaded once; ``sha256`` makes a changed file a miss."""
    tokenizer = Tokenizer(Path(path))
    if tokenizer.sha256 != sha256:
        raise PrepError(f"--tokenizer {path}: changed while the build was running; run it again")
    return tokenizer


def sample_texts(paths: list[Path], text_field: str, max_bytes: int) -> tuple[list[str], int, int]:
    """A sample of the documents of at most ``max_bytes`` that depends on their texts alone.

    Documents with the smallest hashes are kept (a uniform sample in one pass and bounded memory);
    when all fit, all are kept. Returns (texts in order of hash, documents read, bytes read).
    """
    heap: list[tuple[int, str]] = []  # the largest hash on top: hashes are stored negated
    limit = 1 << 64  # hashes from here on do not fit
    held = documents = total = 0
    with Progress("read", sum(path.stat().st_size for path in paths)) as progress:
        for path in paths:
            for item in read_documents(path, text_field):
                if isinstance(item, Malformed) or not item.text:
                    continue
                data = item.text.encode("utf-8")
                documents, total = documents + 1, total + len(data)
                progress.set(total)
                key = text_hash(data)[0]
                if key >= limit:
                    continue
                heapq.heappush(heap, (-key, item.text))
                held += len(data)
                while held > max_bytes and len(heap) > 1:
                    key, text = heapq.heappop(heap)
                    limit, held = -key, held - len(text.encode("utf-8"))
    return [text for _, text in sorted(heap, reverse=True)], documents, total


def _lines(texts: list[str]) -> Iterator[str]:
    for text in texts:
        for line in _LINE_BREAKS.split(text):
            if line:
                yield line


def train_tokenizer(
    inputs: list[str],
    out: Path,
    *,
    vocab_size: int = 8192,
    model_type: str = "bpe",
    text_field: str = "text",
    sample_mb: float = 200.0,
) -> Tokenizer:
    """Train a model on ``inputs`` and write it with its settings to the folder ``out``.

    Deterministic. A folder with the same settings and inputs is left as it is.

    Raises:
        PrepError: bad inputs, a corpus too small for the vocabulary, or a folder that holds
            another tokenizer.
    """
    paths = expand_inputs(inputs)
    settings = {
        "type": "sentencepiece",
        "model_type": model_type,
        "vocab_size": vocab_size,
        "text_field": text_field,
        "sample_mb": sample_mb,
    }
    stamps = [file_stamp(path) for path in paths]
    stored = _stored_info(out, settings)
    finished = stored is not None and (out / MODEL_NAME).exists()
    if finished and stored["inputs"] == stamps:
        say(f"{out / MODEL_NAME} is finished and its inputs are unchanged: nothing to do")
        return Tokenizer(out)

    texts, documents, total = sample_texts(paths, text_field, int(sample_mb * 1e6))
    if not texts:
        raise PrepError(f"no text in the field {text_field!r} of --input; set --text-field")
    digest = hashlib.sha256(repr([text_hash(t.encode("utf-8")) for t in texts]).encode())
    if stored is not None and stored["corpus"] != digest.hexdigest():
        raise PrepError(
            f"{out} holds a tokenizer of other contents of --input; nothing was overwritten: "
            "choose another --out, or delete the folder"
        )
    if finished:
        say(f"{out / MODEL_NAME} is finished and its inputs have the same contents: nothing to do")
        return Tokenizer(out)
    sampled = sum(len(text.encode("utf-8")) for text in texts)
    say(f"training {model_type} with {vocab_size} pieces on {sampled / 1e6:.1f} MB")
    model = _train(texts, vocab_size, model_type, sampled)
    info = {
        "settings": settings,
        "inputs": stamps,
        "corpus": digest.hexdigest(),
        "sha256": hashlib.sha256(model).hexdigest(),
        "documents": documents,
    }
    # The info comes first: a model without it is somebody else's and never overwritten.
    write_atomic(out / INFO_NAME, json.dumps(info, indent=1).encode() + b"\n")
    write_atomic(out / MODEL_NAME, model)
    tokenizer = Tokenizer(out)
    checked = _check_round_trip(tokenizer, texts[:_ROUND_TRIPS])
    say(f"{out / MODEL_NAME}: {tokenizer.vocab_size} pieces, sha256 {tokenizer.sha256[:12]}")
    say(f"read {documents} documents, {total / 1e6:.1f} MB; round trip {checked}")
    return tokenizer


def _stored_info(out: Path, settings: dict) -> dict | None:
    """What ``out`` was made from, if this command made it.

    Raises:
        PrepError: another tokenizer, or a damaged one, is there.
    """
    model = out / MODEL_NAME
    try:
        info = json.loads((out / INFO_NAME).read_bytes())
        info = {key: info[key] for key in ("settings", "inputs", "corpus", "sha256")}
        changed = [key for key, value in settings.items() if info["settings"].get(key) != value]
    except FileNotFoundError:
        if model.exists():
            raise PrepError(
                f"{model} was not made by this command; nothing was overwritten: choose another "
                "--out"
            ) from None
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PrepError(
            f"{out / INFO_NAME} is damaged; delete the folder or choose another --out"
        ) from None
    if changed:
        raise PrepError(
            f"{out} holds a tokenizer of other {', '.join(changed)}; nothing was overwritten: "
            "choose another --out, or delete the folder"
        )
    if model.exists() and hashlib.sha256(model.read_bytes()).hexdigest() != info["sha256"]:
        raise PrepError(f"{model} does not match {INFO_NAME}; delete the folder and run again")
    return info


def _train(texts: list[str], vocab_size: int, model_type: str, sampled: int) -> bytes:
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            bos_id=BOS_ID,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            max_sentence_length=1 << 20,
            num_threads=_TRAINER_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise PrepError(_explain(str(error), vocab_size, sampled)) from None
    return model.getvalue()


def _explain(message: str, vocab_size: int, sampled: int) -> str:
    """A trainer failure in the user's terms."""
    size = f"{sampled / 1e6:.2f} MB of text"
    if found := re.search(r"too high.*<= (\d+)", message):
        return (
            f"--vocab-size {vocab_size} is too large for {size}: it yields at most "
            f"{found[1]} pieces; use --vocab-size {found[1]} or less, or more text"
        )
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"--vocab-size {vocab_size} is too small: bytes, characters and special symbols of "
            f"this text need {found[1]} pieces; use --vocab-size {found[1]} or more"
        )
    return f"SentencePiece cannot train on {size} with --vocab-size {vocab_size}: {message}"


def _check_round_trip(tokenizer: Tokenizer, texts: list[str]) -> str:
    """Encode and decode ``texts``; raises PrepError for the first that comes back changed."""
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        if tokenizer.decode(ids) != text:
            raise PrepError(f"the tokenizer does not give back the text {text[:60]!r}")
    return f"checked on {len(texts)} documents"
