"""Words of the cache have the ids of SentencePiece, for any text, or the cache is not used."""

import io
import re

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from tests.data_prep.small_corpus import make_texts
from xlstm_io.tokenizer import sentencepiece_model, word_cache
from xlstm_io.tokenizer.sentencepiece_model import SentencePieceTokenizer
from xlstm_io.tokenizer.word_cache import AWKWARD, WordCache, word_pattern

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


def open_model(model: bytes, folder) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(folder / "tokenizer.model", {"tokenizer.model": model})


def pattern_of(model: bytes) -> re.Pattern | None:
    return word_pattern(model_pb2.ModelProto.FromString(model))


def processor_of(model: bytes) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_proto=model)


PARTS = st.sampled_from(
    ["def", "state", "x = 1", "naïve", "да", "'", "(x2)", ".5", "\n", "  ", "\t"]
)
TEXTS = st.one_of(st.text(), st.lists(st.one_of(PARTS, st.text(max_size=3))).map("".join))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_any_text_has_sentencepieces_ids(models, kind, tmp_path):
    tokenizer, plain = open_model(models[kind], tmp_path), processor_of(models[kind])
    tokenizer.encode(["x" * word_cache._CHECKED_CHARS])  # past the comparison
    assert (tokenizer._word_cache is not None) == (kind == "bpe")

    @settings(max_examples=300, deadline=None)
    @given(st.lists(TEXTS, max_size=4))
    def check(texts):
        texts = [text.replace("\u2581", "") for text in texts] * 3  # not all of it new
        assert [ids.tolist() for ids in tokenizer.encode(texts)] == plain.encode(texts)

    check()


@pytest.mark.parametrize("number", range(len(word_cache._PATTERNS)))
def test_every_pattern_that_the_pieces_allow_is_exact(models, number):
    pattern = re.compile(word_cache._PATTERNS[number])
    pieces = [p.piece for p in model_pb2.ModelProto.FromString(models["bpe"]).pieces if p.type == 1]
    allowed = all(len(pattern.findall(piece.replace("\u2581", " "))) == 1 for piece in pieces)
    texts = [*make_texts(40), *AWKWARD]
    texts = [text.replace("\u2581", "") for text in texts]
    cache, plain = WordCache(processor_of(models["bpe"]), pattern), processor_of(models["bpe"])
    assert all("".join(pattern.findall(text)) == text for text in texts)
    assert allowed and cache.agrees(texts, plain.encode(texts))


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
    assert pattern_of(train(**change)) is None


def test_pieces_decide_how_fine_words_are(models):
    assert pattern_of(models["bpe"]).pattern == word_cache._PATTERNS[0]
    mixed = train(split_by_unicode_script=False)  # pieces such as "x2)"
    assert pattern_of(mixed).pattern == word_cache._PATTERNS[-1]
    unused = model_pb2.ModelProto.FromString(models["bpe"])
    unused.pieces[-1].type = model_pb2.ModelProto.SentencePiece.UNUSED
    assert word_pattern(unused) is None


def test_a_difference_ends_the_use_of_the_cache_with_a_message(
    models, tmp_path, monkeypatch, caplog
):
    wrong = re.compile(r"[^\n]|\n+")  # every character on its own
    monkeypatch.setattr(sentencepiece_model, "word_pattern", lambda model: wrong)
    tokenizer, plain = open_model(models["bpe"], tmp_path), processor_of(models["bpe"])
    texts = [text.replace("\u2581", "") for text in make_texts(20)]
    for _ in range(2):
        assert [ids.tolist() for ids in tokenizer.encode(texts)] == plain.encode(texts)
    assert caplog.text.count("going on without the word cache") == 1


def test_the_cache_is_bounded_and_keeps_no_long_words(models, monkeypatch):
    monkeypatch.setattr(word_cache, "_LIMIT", 50)
    plain = processor_of(models["bpe"])
    cache = WordCache(plain, pattern_of(models["bpe"]))
    for start in range(0, 400, 20):
        texts = [" ".join(f"w{number} {'y' * 70}" for number in range(start, start + 20))]
        assert cache.agrees(texts, plain.encode(texts))
        assert len(cache._ids) <= 50 and max(map(len, cache._ids), default=0) <= 65
