"""Remembered words have the ids of SentencePiece, for any text, or the memory is not used."""

import io
import re

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from tests.data_prep.helpers import make_texts
from xlstm_io.tokenizer import encode as tokenizer_module
from xlstm_io.tokenizer import word_memo
from xlstm_io.tokenizer.encode import _AWKWARD, SentencePieceTokenizer
from xlstm_io.tokenizer.word_memo import WordMemo, word_pattern

OWN = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "byte_fallback": True}
OWN |= {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}
OWN |= {"user_defined_symbols": ["\n"], "pad_id": 3}


def train(**settings) -> bytes:
    model = io.BytesIO()
    lines = [f"{t} a1, (x2) don't {n}.5 naïve, да. 'да'" for n, t in enumerate(make_texts())]
    given = OWN | {"model_type": "bpe", "vocab_size": 420, "hard_vocab_limit": False} | settings
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, num_threads=1, **given
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, bytes]:
    return {"bpe": train(), "unigram": train(model_type="unigram")}


def open_tokenizer(model: bytes, folder) -> SentencePieceTokenizer:
    (folder / "tokenizer.model").write_bytes(model)
    return SentencePieceTokenizer(folder)


def processor_of(model: bytes) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_proto=model)


PARTS = st.sampled_from(
    ["def", "state", "x = 1", "naïve", "да", "'", "(x2)", ".5", "\n", "  ", "\t"]
)
TEXTS = st.one_of(st.text(), st.lists(st.one_of(PARTS, st.text(max_size=3))).map("".join))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_any_text_has_sentencepieces_ids(models, kind, tmp_path):
    tokenizer, plain = open_tokenizer(models[kind], tmp_path), processor_of(models[kind])
    tokenizer.encode(["x" * tokenizer_module._CHECKED_CHARS])  # past the comparison
    assert (tokenizer._memo is not None) == (kind == "bpe")

    @settings(max_examples=300, deadline=None)
    @given(st.lists(TEXTS, max_size=4))
    def check(texts):
        texts = [text.replace("\u2581", "") for text in texts] * 3  # not all of it new
        assert [ids.tolist() for ids in tokenizer.encode(texts)] == plain.encode(texts)

    check()


@pytest.mark.parametrize("number", range(len(word_memo._PATTERNS)))
def test_every_pattern_that_the_pieces_allow_is_exact(models, number):
    pattern = re.compile(word_memo._PATTERNS[number])
    pieces = [p.piece for p in model_pb2.ModelProto.FromString(models["bpe"]).pieces if p.type == 1]
    allowed = all(len(pattern.findall(piece.replace("\u2581", " "))) == 1 for piece in pieces)
    texts = [*make_texts(40), *_AWKWARD]
    texts = [text.replace("\u2581", "") for text in texts]
    memo, plain = WordMemo(processor_of(models["bpe"]), pattern), processor_of(models["bpe"])
    assert all("".join(pattern.findall(text)) == text for text in texts)
    assert allowed and memo.agrees(texts, plain.encode(texts))


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "unigram"},
        {"model_type": "word"},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"byte_fallback": False},
        {"treat_whitespace_as_suffix": True},
        {"user_defined_symbols": ["\n", "x = 1"]},
        {"user_defined_symbols": ["\n\ndef", "\n"]},
        {"split_by_whitespace": False},
    ],
    ids=str,
)
def test_models_whose_pieces_may_cross_are_left_alone(change):
    assert word_pattern(train(**change)) is None


def test_pieces_decide_how_fine_words_are(models):
    assert word_pattern(models["bpe"]).pattern == word_memo._PATTERNS[0]
    mixed = train(split_by_unicode_script=False)  # pieces such as "x2)"
    assert word_pattern(mixed).pattern == word_memo._PATTERNS[-1]
    unused = model_pb2.ModelProto.FromString(models["bpe"])
    unused.pieces[-1].type = model_pb2.ModelProto.SentencePiece.UNUSED
    assert word_pattern(unused.SerializeToString()) is None


def test_a_difference_ends_the_memory_with_a_message(models, tmp_path, monkeypatch, capsys):
    wrong = re.compile(r"[^\n]|\n+")  # every character on its own
    monkeypatch.setattr(tokenizer_module, "word_pattern", lambda model: wrong)
    tokenizer, plain = open_tokenizer(models["bpe"], tmp_path), processor_of(models["bpe"])
    texts = [text.replace("\u2581", "") for text in make_texts(20)]
    for _ in range(2):
        assert [ids.tolist() for ids in tokenizer.encode(texts)] == plain.encode(texts)
    assert capsys.readouterr().out.count("going on without the memory of words") == 1


def test_memory_is_bounded_and_forgets_long_words(models, monkeypatch):
    monkeypatch.setattr(word_memo, "_LIMIT", 50)
    plain = processor_of(models["bpe"])
    memo = WordMemo(plain, word_pattern(models["bpe"]))
    for start in range(0, 400, 20):
        texts = [" ".join(f"w{number} {'y' * 70}" for number in range(start, start + 20))]
        assert memo.agrees(texts, plain.encode(texts))
        assert len(memo._ids) <= 50 and max(map(len, memo._ids), default=0) <= 65
