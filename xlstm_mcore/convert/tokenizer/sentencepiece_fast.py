"""A SentencePiece BPE model as a fast (tokenizers) tokenizer, with the ids of the shards.

transformers' own reading of a bare `tokenizer.model` differs from SentencePiece on ordinary text
(it sets no normaliser and takes every model for BPE). So the conversion follows the model's own
protocol buffer. Whether the result is exact is decided by a comparison on many texts
(`xlstm_mcore.convert.tokenizer.write`), not here.

Unigram models have no exact fast form: tokenizers adds up scores in another order, and finds
control symbols in a text, where SentencePiece reads them as text.
"""

from collections.abc import Sequence

from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from xlstm_io.tokenizer.sentencepiece_model import SPACE_SYMBOL, SentencePieceTokenizer
from xlstm_mcore.convert.errors import ConvertError

Piece = model_pb2.ModelProto.SentencePiece


def fast_tokenizer(tokenizer: SentencePieceTokenizer) -> PreTrainedTokenizerFast:
    """The fast form of a SentencePiece BPE model.

    Control symbols written in a text are text, and `[bos]` is put in front, as in training.

    Raises:
        ConvertError: The model has features that have no counterpart here.
    """
    model = tokenizer.proto
    _check_convertible(model)
    pieces, spec = list(model.pieces), model.trainer_spec
    # Training encodes a U+2581 of a text as its three bytes where the model has bytes
    # (`SentencePieceTokenizer.encode`). Then spaces stay spaces in the fast form's pieces, so that
    # U+2581 is a character without a piece. In a model without bytes the two are the same.
    space = " " if spec.byte_fallback else SPACE_SYMBOL
    names = _names(pieces, space)
    fast = Tokenizer(
        models.BPE(
            vocab={name: index for index, name in enumerate(names)},
            merges=_merges(pieces, names),
            unk_token=names[spec.unk_id],
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    )
    steps = _normalizers(model.normalizer_spec, space)
    if steps:
        fast.normalizer = normalizers.Sequence(steps)
    readers = [decoders.Replace(SPACE_SYMBOL, " ")] if space == SPACE_SYMBOL else []
    readers += [decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        readers.append(decoders.Strip(" ", 1, 0))
    fast.decoder = decoders.Sequence(readers)
    # User-defined symbols are matched in the normalised text, on both sides. One that was given
    # with a plain space is never found there (spaces are escaped by then): it gets no match here.
    fast.add_tokens(
        [
            AddedToken(name, normalized=True, special=False)
            for piece, name in zip(pieces, names, strict=True)
            if piece.type == Piece.USER_DEFINED and " " not in piece.piece
        ]
    )
    named = {
        f"{role}_token": names[index]
        for role, index in (("bos", spec.bos_id), ("eos", spec.eos_id), ("pad", spec.pad_id))
        if index >= 0
    }
    if spec.bos_id >= 0:
        bos = names[spec.bos_id]
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, spec.bos_id)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token=names[spec.unk_id],
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        **named,
    )


def _check_convertible(model: model_pb2.ModelProto) -> None:
    """Raise a ConvertError that names each feature that has no counterpart here."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    problems = {
        "it is not BPE": trainer.model_type != model_pb2.TrainerSpec.BPE,
        "it does not escape whitespaces": not normalizer.escape_whitespaces,
        "it treats whitespace as a suffix": trainer.treat_whitespace_as_suffix,
        "it has unused pieces": any(piece.type == Piece.UNUSED for piece in model.pieces),
    }
    found = [text for text, there in problems.items() if there]
    if found:
        raise ConvertError(", ".join(found))


def _names(pieces: Sequence[Piece], space: str) -> list[str]:
    """The pieces as the fast form spells them, each once."""
    names: list[str] = []
    taken = {piece.piece.replace(SPACE_SYMBOL, space) for piece in pieces if " " not in piece.piece}
    for index, piece in enumerate(pieces):
        name = piece.piece.replace(SPACE_SYMBOL, space)
        if " " in piece.piece and name in taken:  # never found in a text, and needs a name
            name = f"{piece.piece}<{index}>"
        names.append(name)
    return names


def _normalizers(spec: model_pb2.NormalizerSpec, space: str) -> list[normalizers.Normalizer]:
    """What SentencePiece does to a text before it looks for pieces, in its order."""
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex("^ +| +$"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if space == SPACE_SYMBOL:
        steps.append(normalizers.Replace(" ", SPACE_SYMBOL))
    return steps


def _merges(pieces: Sequence[Piece], names: Sequence[str]) -> list[tuple[str, str]]:
    """Merges in the order in which SentencePiece prefers them: by the score of the result."""
    scores = {
        name: piece.score
        for piece, name in zip(pieces, names, strict=True)
        if piece.type == Piece.NORMAL
    }
    merges = [
        (-score, len(merged[:cut]), merged[:cut], merged[cut:])
        for merged, score in scores.items()
        for cut in range(1, len(merged))
        if merged[:cut] in scores and merged[cut:] in scores
    ]
    return [(left, right) for *_, left, right in sorted(merges)]
