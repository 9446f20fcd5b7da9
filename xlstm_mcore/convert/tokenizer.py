"""A SentencePiece BPE model as a fast (tokenizers) tokenizer, with the same ids.

transformers' own reading of a bare `tokenizer.model` differs from SentencePiece on ordinary text
(it sets no normaliser and takes every model for BPE), so the conversion is driven by the model's
own protobuf and then gated: ids and decoded text must equal SentencePiece's on samples.
"""

from __future__ import annotations

import random
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from xlstm_mcore.convert.errors import ConvertError

SPACE = "\u2581"  # SentencePiece writes a space as this character
Piece = proto.ModelProto.SentencePiece

SAMPLES = (
    "",
    " ",
    "a",
    "  two  spaces and a trailing one ",
    "Hello, world!\nSecond line\r\n\ttabbed\n\n\n",
    "def f(x):\n    return {'k': [1, 2.5e-3, 0xFF], \"s\": f'{x!r}'}  # 0123456789\n",
    "Grüße, naïve façade, señor, Ωμέγα, Привет, 你好世界, こんにちは, 안녕, العربية, עברית",
    "e\u0301 vs \u00e9, \ufb01 ligature, \u00a0nbsp, \u200bzero width, \u3000wide, \ufeffbom",
    "👩‍👩‍👧‍👦 🇩🇪 🤖 \U0001d54f \U0010ffff",
    "\x01\x02 control \x7f",
    "<s> </s> <unk> <pad> <0x41> are text here; so is " + SPACE,
    "a" * 500 + " " * 70 + "ab" * 100,
)


def fast_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of the SentencePiece model `path`.

    Control symbols written in a text are text, as in SentencePiece; `[bos]` is put in front, as in
    training. Raises ConvertError if the model has features that cannot be converted exactly, or if
    the result differs from SentencePiece on the samples.
    """
    model = proto.ModelProto()
    model.ParseFromString(path.read_bytes())
    _check_convertible(model)
    pieces = list(model.pieces)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece.piece: index for index, piece in enumerate(pieces)},
            merges=_merges(pieces),
            unk_token=pieces[model.trainer_spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    # User-defined symbols are matched in the normalised text, on both sides. One that was given
    # with a plain space is never found there (spaces are escaped by then): it gets no match here.
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=True, special=False)
            for piece in pieces
            if piece.type == Piece.USER_DEFINED and " " not in piece.piece
        ]
    )
    spec = model.trainer_spec
    named = {
        f"{role}_token": pieces[index].piece
        for role, index in (("bos", spec.bos_id), ("eos", spec.eos_id), ("pad", spec.pad_id))
        if index >= 0
    }
    if spec.bos_id >= 0:
        bos = pieces[spec.bos_id].piece
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, spec.bos_id)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=pieces[spec.unk_id].piece,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        **named,
    )
    check_equal(fast, sentencepiece.SentencePieceProcessor(model_file=str(path)))
    return fast


def check_equal(fast: PreTrainedTokenizerFast, exact: sentencepiece.SentencePieceProcessor) -> None:
    """ConvertError unless both give the same ids and decode them to the same text."""
    bos = [exact.bos_id()] if exact.bos_id() >= 0 else []
    for text in (*SAMPLES, *_random_texts(exact, 300)):
        expected = exact.encode(text)
        found = fast.encode(text, add_special_tokens=False)
        if found != expected:
            raise ConvertError(
                f"the converted tokenizer gives other ids than SentencePiece for {text[:60]!r}"
            )
        if fast.encode(text) != bos + expected:
            raise ConvertError(f"the converted tokenizer puts no bos before {text[:60]!r}")
        if fast.decode(expected, skip_special_tokens=True) != exact.decode(expected):
            raise ConvertError(
                f"the converted tokenizer decodes the ids of {text[:60]!r} to another text"
            )


def _check_convertible(model: proto.ModelProto) -> None:
    """ConvertError naming the feature of a model that has no exact counterpart here."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    problems = {
        "it is not BPE": trainer.model_type != proto.TrainerSpec.BPE,
        "it has a normalisation rule": bool(normalizer.precompiled_charsmap),
        "it adds a dummy prefix": normalizer.add_dummy_prefix,
        "it removes extra whitespaces": normalizer.remove_extra_whitespaces,
        "it does not escape whitespaces": not normalizer.escape_whitespaces,
        "it treats whitespace as a suffix": trainer.treat_whitespace_as_suffix,
        "it has unused pieces": any(piece.type == Piece.UNUSED for piece in model.pieces),
    }
    found = [text for text, there in problems.items() if there]
    if found:
        raise ConvertError(
            f"this SentencePiece model has no exact fast tokenizer: {', '.join(found)}"
        )


def _merges(pieces: list) -> list[tuple[str, str]]:
    """Merges in the order in which SentencePiece prefers them: by the score of the result."""
    scores = {piece.piece: piece.score for piece in pieces if piece.type == Piece.NORMAL}
    merges = [
        (-score, len(merged[:cut]), merged[:cut], merged[cut:])
        for merged, score in scores.items()
        for cut in range(1, len(merged))
        if merged[:cut] in scores and merged[cut:] in scores
    ]
    return [(left, right) for *_, left, right in sorted(merges)]


def _random_texts(exact: sentencepiece.SentencePieceProcessor, count: int) -> list[str]:
    """Texts made of random pieces of the vocabulary: its rarest merges occur as well."""
    rng = random.Random(0)
    ordinary = [
        index
        for index in range(exact.vocab_size())
        if not (exact.is_control(index) or exact.is_unknown(index) or exact.is_byte(index))
    ]
    return [
        "".join(
            exact.id_to_piece(rng.choice(ordinary)).replace(SPACE, " ")
            for _ in range(rng.randrange(1, 60))
        )
        for _ in range(count)
    ]
