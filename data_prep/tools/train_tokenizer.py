"""Making a tokenizer: training a SentencePiece model, or adopting one that exists."""

import hashlib
import heapq
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import sentencepiece as spm

from data_prep.jobs.progress import Progress, say
from data_prep.sources.documents import DEFAULT_FIELDS, Fields, is_empty, text_hash
from data_prep.sources.files import expand_inputs, file_fingerprint, file_size
from data_prep.sources.malformed import MAX_BAD_SHARE, Tally, read_counted, report_malformed
from xlstm_io.errors import PrepError, TokenizerFileError
from xlstm_io.storage import write_atomic
from xlstm_io.terminal import counted
from xlstm_io.tokenizer import Tokenizer, open_tokenizer
from xlstm_io.tokenizer.base import HF_CONFIG_NAME, HF_NAME
from xlstm_io.tokenizer.base import SENTENCEPIECE_NAME as MODEL_NAME

INFO_NAME = "tokenizer_info.json"
# The ids of the Hugging Face xlstm configuration's defaults.
BOS_ID, PAD_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
_TRAINER_THREADS = 2  # fixed: the sums of unigram training depend on the number of threads
_ROUND_TRIPS = 200
_LONGEST_LINE = 1 << 20  # bytes; the trainer skips longer ones
_MOST_BYTES = 4  # of a character
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_CPP_ASSERTION = re.compile(r"INTERNAL: |\S+\.cc\(\d+\) \[.*\]")
_LINE_BREAKS = re.compile("[\n\t]")  # the trainer skips whole lines that contain a tab


def sample_texts(
    paths: list[str], fields: Fields, max_bytes: int, max_bad_share: float = MAX_BAD_SHARE
) -> tuple[list[str], int, int]:
    """A sample of the documents of at most `max_bytes` that depends on their texts alone.

    Documents with the smallest hashes are kept: a uniform sample in one pass and bounded memory.
    When all fit, all are kept.

    Returns:
        Texts in order of their hashes, documents read, bytes read.

    Raises:
        PrepError: too many records are malformed.
    """
    heap: list[tuple[int, str]] = []  # the largest hash on top: hashes are stored negated
    limit = 1 << 64  # hashes from here on do not fit
    held = documents = total = 0
    tallies = list[Tally]()
    with Progress("read", sum(file_size(path) for path in paths)) as progress:
        for document in read_counted(paths, fields, tallies):
            if is_empty(document.text):
                continue
            data = document.text.encode("utf-8")
            documents, total = documents + 1, total + len(data)
            progress.set(total)
            key = text_hash(data)[0]
            if key >= limit:
                continue
            heapq.heappush(heap, (-key, document.text))
            held += len(data)
            while held > max_bytes and len(heap) > 1:
                key, text = heapq.heappop(heap)
                limit, held = -key, held - len(text.encode("utf-8"))
    report_malformed(tallies, max_bad_share)
    return [text for _, text in sorted(heap, reverse=True)], documents, total


def _lines(texts: list[str]) -> Iterator[str]:
    for text in texts:
        for line in _LINE_BREAKS.split(text):
            if len(line) * _MOST_BYTES <= _LONGEST_LINE or len(line.encode()) <= _LONGEST_LINE:
                if line:
                    yield line
            else:
                yield from _cut(line)


def _cut(line: str) -> Iterator[str]:
    """A line that the trainer would skip, in parts that begin with a space where there is one."""
    most = _LONGEST_LINE // _MOST_BYTES
    while line:
        end = line.rfind(" ", 1, most) if len(line) > most else len(line)
        end = end if end > 0 else most
        yield line[:end]
        line = line[end:]


def train_tokenizer(
    inputs: list[str],
    out: Path,
    *,
    vocab_size: int = 8192,
    model_type: str = "bpe",
    sample_mb: float = 200.0,
    special_tokens: tuple[str, ...] = (),
    fields: Fields = DEFAULT_FIELDS,
    max_bad_share: float = MAX_BAD_SHARE,
) -> Tokenizer:
    """Train a model on `inputs` and write it with its settings to the folder `out`.

    The same inputs and settings give the same model. A folder that has it already is left as it
    is.

    Args:
        inputs: files, folders, globs or URLs.
        out: the folder.
        vocab_size: number of pieces, with bytes and special symbols.
        model_type: "bpe" or "unigram".
        sample_mb: largest sample to train on, in megabytes.
        special_tokens: get ids of their own that no text yields.
        fields: where the documents are within a file.
        max_bad_share: largest share of malformed records, or bytes, that is accepted.

    Raises:
        PrepError: bad inputs, too many malformed records, a corpus too small for the vocabulary,
            or a folder that holds another tokenizer.
    """
    _check_special_tokens(special_tokens)
    paths = expand_inputs(inputs)
    settings = {
        "type": "sentencepiece",
        "model_type": model_type,
        "vocab_size": vocab_size,
        "text_field": fields.text,
        "text_split": fields.split,
        "sample_mb": sample_mb,
        "special_tokens": list(special_tokens),
    }
    fingerprints = [file_fingerprint(path) for path in paths]
    stored = _stored_info(out, settings)
    finished = stored is not None and (out / MODEL_NAME).exists()
    if finished and stored is not None and stored["inputs"] == fingerprints:
        say(f"{out / MODEL_NAME} is finished and its inputs are unchanged: nothing to do")
        return open_tokenizer(out / MODEL_NAME)

    texts, documents, total = sample_texts(paths, fields, int(sample_mb * 1e6), max_bad_share)
    if not texts:
        raise PrepError(f"no text in the field {fields.text!r} of --input; set --text-field")
    digest = hashlib.sha256(repr([text_hash(t.encode("utf-8")) for t in texts]).encode())
    if stored is not None and stored["corpus"] != digest.hexdigest():
        raise PrepError(
            f"{out} holds a tokenizer of other contents of --input; nothing was overwritten: "
            "choose another --out, or delete the folder"
        )
    if finished:
        say(f"{out / MODEL_NAME} is finished and its inputs have the same contents: nothing to do")
        return open_tokenizer(out / MODEL_NAME)
    sampled = sum(len(text.encode("utf-8")) for text in texts)
    say(f"training {model_type} with {vocab_size} pieces on {sampled / 1e6:.1f} MB")
    model = _train(texts, vocab_size, model_type, sampled, special_tokens)
    info = {
        "settings": settings,
        "inputs": fingerprints,
        "corpus": digest.hexdigest(),
        "sha256": hashlib.sha256(model).hexdigest(),
        "documents": documents,
    }
    # The info is written first: a model without one was made by something else, and is never
    # overwritten.
    write_atomic(out / INFO_NAME, json.dumps(info, indent=1).encode() + b"\n")
    write_atomic(out / MODEL_NAME, model)
    tokenizer = open_tokenizer(out / MODEL_NAME)
    checked = _check_round_trip(tokenizer, texts[:_ROUND_TRIPS])
    say(f"{out / MODEL_NAME}: {tokenizer.vocab_size} pieces, sha256 {tokenizer.sha256[:12]}")
    say(f"read {documents} documents, {total / 1e6:.1f} MB; round trip {checked}")
    return tokenizer


def _stored_info(out: Path, settings: dict) -> dict | None:
    """What `out` was made from, if this command made it.

    Raises:
        PrepError: another tokenizer, or a damaged one, is there.
    """
    model = out / MODEL_NAME
    try:
        info = json.loads((out / INFO_NAME).read_bytes())
        info = {key: info[key] for key in ("settings", "inputs", "corpus", "sha256")}
        # Older versions had no special tokens, and did not note how text files were split: what was
        # read of them is not known then.
        known = {"special_tokens": [], "text_split": settings["text_split"]} | info["settings"]
        info["inputs"] = info["inputs"] if "text_split" in info["settings"] else None
        changed = [key for key, value in settings.items() if known.get(key) != value]
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


def _train(
    texts: list[str],
    vocab_size: int,
    model_type: str,
    sampled: int,
    special_tokens: tuple[str, ...],
) -> bytes:
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
            control_symbols=list(special_tokens),
            bos_id=BOS_ID,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            max_sentence_length=_LONGEST_LINE,
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
    reason = _CPP_ASSERTION.sub("", message).strip() or "it does not say why"
    return f"SentencePiece cannot train on {size} with --vocab-size {vocab_size}: {reason}"


def _check_special_tokens(tokens: tuple[str, ...]) -> None:
    """Check that each can get an id of its own.

    Raises:
        PrepError: one is empty, given twice, or has an id already.
    """
    for number, token in enumerate(tokens):
        problem = ""
        if not token:
            problem = "a token is a text that is not empty"
        elif token in tokens[:number]:
            problem = "it is given twice"
        elif token in ("<unk>", "\n") or _BYTE.fullmatch(token):
            problem = "every tokenizer has this one"
        if problem:
            raise PrepError(f"--special-tokens {token!r}: {problem}; leave it out")


def _check_round_trip(tokenizer: Tokenizer, texts: list[str]) -> str:
    """Encode and decode `texts`; raises PrepError for the first that comes back changed."""
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        if tokenizer.decode(ids) != text:
            raise PrepError(f"the tokenizer does not give back the text {text[:60]!r}")
    return f"checked on {counted(len(texts), 'document')}"


def adopt_tokenizer(
    path: Path, out: Path, *, bos_token: str | None = None, eos_token: str | None = None
) -> Tokenizer:
    """Copy a SentencePiece `.model` or a Hugging Face tokenizer folder to the folder `out`.

    Args:
        path: the model file, or the folder with `tokenizer.json`.
        out: folder of its own.
        bos_token: for a Hugging Face tokenizer that names none: a token of its vocabulary.
        eos_token: likewise.

    Raises:
        TokenizerFileError: not a usable tokenizer.
        PrepError: `out` holds another one.
    """
    config_file = path / HF_CONFIG_NAME
    if not path.exists():
        raise PrepError(
            f"there is no file or folder {path}; a model of the Hub is downloaded first: "
            "`hf download NAME tokenizer.json tokenizer_config.json --local-dir FOLDER`"
        )
    if (path / HF_NAME).exists():
        config = json.loads(config_file.read_bytes()) if config_file.exists() else {}
        given = {"bos_token": bos_token, "eos_token": eos_token}
        config |= {key: token for key, token in given.items() if token}
        if not isinstance(config.get("tokenizer_class"), str):
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        files = {HF_NAME: (path / HF_NAME).read_bytes()}
        files[HF_CONFIG_NAME] = json.dumps(config, indent=1).encode() + b"\n"
    elif bos_token or eos_token:
        raise PrepError("--bos-token and --eos-token are for Hugging Face tokenizers")
    else:
        files = open_tokenizer(path).files
    for name in (MODEL_NAME, HF_NAME, HF_CONFIG_NAME):
        there = (out / name).read_bytes() if (out / name).exists() else None
        if there is not None and there != files.get(name):
            raise PrepError(
                f"{out / name} is of another tokenizer; nothing was overwritten: choose another "
                "--out"
            )
    for name, data in files.items():
        write_atomic(out / name, data)
    try:
        tokenizer = open_tokenizer(out)
        tokenizer.document_ids()
    except TokenizerFileError:
        for name in files:
            (out / name).unlink()
        raise
    lossy = [text for text in _SAMPLES if tokenizer.decode(tokenizer.encode([text])[0]) != text]
    say(f"{tokenizer.path}: {tokenizer.vocab_size} ids, sha256 {tokenizer.sha256[:12]}")
    if lossy:
        say(f"round trip: these texts come back changed: {lossy}; builds count such documents")
    else:
        say(f"round trip: {len(_SAMPLES)} awkward texts come back unchanged")
    return tokenizer


_SAMPLES = ("a  b", " leading", "tab\t and\r\n line\n\n", "na\u00efve \u65e5\u672c \U0001f600")
