"""A SentencePiece BPE model as a fast (tokenizers) tokenizer, with the ids of the shards.

transformers' own reading of a bare `tokenizer.model` differs from SentencePiece on ordinary text
(it sets no normaliser and takes every model for BPE). So the conversion follows the model's own
protocol buffer, and is then checked: ids and decoded text must equal those of training on samples.

One character is left out of the check. Training encodes a U+2581 of a text as its three bytes; the
fast form reads it as a space, as SentencePiece does. `SPACE_SYMBOL_NOTE` tells the user.
"""

import random
from collections.abc import Sequence

from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from xlstm_io.tokenizer.sentencepiece_model import SPACE_SYMBOL, SentencePieceTokenizer
from xlstm_mcore.convert.errors import ConvertError

Piece = model_pb2.ModelProto.SentencePiece

SPACE_SYMBOL_NOTE = (
    "The fast tokenizer reads the character U+2581 as a space; training kept it as it is."
)

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
    "<s> </s> <unk> <pad> <0x41> are text here; so is",
    f"a{SPACE_SYMBOL} {SPACE_SYMBOL}{SPACE_SYMBOL}b",
    "a" * 500 + " " * 70 + "ab" * 100,
)


def fast_tokenizer(tokenizer: SentencePieceTokenizer) -> PreTrainedTokenizerFast:
    """The fast form of a SentencePiece model.

    Control symbols written in a text are text, and `[bos]` is put in front, as in training.

    Raises:
        ConvertError: the model has features that cannot be converted exactly, or the result gives
            other ids than `tokenizer` on the samples.
    """
    model = tokenizer.proto
    _check_convertible(model)
    pieces = list(model.pieces)
    fast = Tokenizer(
        models.BPE(
            vocab={piece.piece: index for index, piece in enumerate(pieces)},
            merges=_merges(pieces),
            unk_token=pieces[model.trainer_spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    fast.normalizer = normalizers.Replace(" ", SPACE_SYMBOL)
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_SYMBOL, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    # User-defined symbols are matched in the normalised text, on both sides. One that was given
    # with a plain space is never found there (spaces are escaped by then): it gets no match here.
    fast.add_tokens(
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
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, spec.bos_id)]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token=pieces[spec.unk_id].piece,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        **named,
    )
    check_equal(wrapped, tokenizer)
    return wrapped


def check_equal(fast: PreTrainedTokenizerFast, exact: SentencePieceTokenizer) -> None:
    """Check that both give the same ids and decode them to the same text, except for U+2581.

    Raises:
        ConvertError: they differ.
    """
    bos = [] if exact.bos_id is None else [exact.bos_id]
    texts = [text for text in SAMPLES if SPACE_SYMBOL not in text] + _random_texts(exact, 300)
    for text, ids in zip(texts, exact.encode(texts), strict=True):
        expected = ids.tolist()
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


def _check_convertible(model: model_pb2.ModelProto) -> None:
    """Raise a ConvertError that names each feature that has no exact counterpart here."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    problems = {
        "it is not BPE": trainer.model_type != model_pb2.TrainerSpec.BPE,
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


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Merges in the order in which SentencePiece prefers them: by the score of the result."""
    scores = {piece.piece: piece.score for piece in pieces if piece.type == Piece.NORMAL}
    merges = [
        (-score, len(merged[:cut]), merged[:cut], merged[cut:])
        for merged, score in scores.items()
        for cut in range(1, len(merged))
        if merged[:cut] in scores and merged[cut:] in scores
    ]
    return [(left, right) for *_, left, right in sorted(merges)]


def _random_texts(exact: SentencePieceTokenizer, count: int) -> list[str]:
    """Texts made of random pieces of the vocabulary: its rarest merges occur as well."""
    rng = random.Random(0)
    text_kinds = (Piece.NORMAL, Piece.USER_DEFINED)
    pieces = [piece.piece for piece in exact.proto.pieces if piece.type in text_kinds]
    ordinary = [piece.replace(SPACE_SYMBOL, " ") for piece in pieces]
    return ["".join(rng.choices(ordinary, k=rng.randrange(1, 60))) for _ in range(count)]
