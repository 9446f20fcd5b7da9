"""Text that comes out id by id is the text of all ids."""

import io
import random

import pytest
import sentencepiece

from tests.data_prep.small_corpus import make_texts, save_hf_tokenizer
from xlstm_io.tokenizer import open_tokenizer, tokenizer_from_files
from xlstm_io.tokenizer.text_stream import TextStream

TEXTS = [
    *make_texts(40),
    "na\u00efve \U0001f469\u200d\U0001f467 \u4f60\u597d  two\n\n\ttabs ",
    "\u2581 a\u2581b",
]


@pytest.fixture(scope="module", params=["ours", "dummy_prefix", "hugging_face"])
def tokenizer(request, tmp_path_factory):
    if request.param == "hugging_face":
        folder = tmp_path_factory.mktemp("hf")
        return open_tokenizer(save_hf_tokenizer(folder, TEXTS))
    model = io.BytesIO()
    plain = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type="bpe",
        byte_fallback=True,
        vocab_size=350,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **(plain if request.param == "ours" else {}),
    )
    return tokenizer_from_files(
        {"tokenizer.model": model.getvalue()}, tmp_path_factory.getbasetemp()
    )


@pytest.mark.parametrize("prompt", ["", "the "])
def test_parts_join_to_the_text_of_all_ids(tokenizer, prompt):
    before = tokenizer.encode([prompt])[0].tolist()
    for text in TEXTS:
        ids = tokenizer.encode([text])[0].tolist()
        stream = TextStream(tokenizer, before)
        parts = [stream.push(token) for token in ids]
        assert all("\ufffd" not in part for part in parts), "half a character was given out"
        whole = tokenizer.decode([*before, *ids])[len(tokenizer.decode(before)) :]
        assert "".join(parts) + stream.finish() == whole


def test_ids_in_any_order_too(tokenizer):
    """A model that is not trained yet writes bytes that are not characters, and special ids."""
    rng = random.Random(0)
    for _ in range(60):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(40)]
        stream = TextStream(tokenizer, [])
        text = "".join(stream.push(token) for token in ids) + stream.finish()
        assert text == tokenizer.decode(ids)
