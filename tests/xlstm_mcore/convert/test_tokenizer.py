"""Tokenizers of exports: ids of the shards, on many texts, for every kind of tokenizer."""

import json
import os
import subprocess
import sys

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests.data_prep.small_corpus import make_texts, save_hf_tokenizer
from tests.xlstm_mcore.convert.small import train_tokenizer
from xlstm_io.tokenizer import open_tokenizer
from xlstm_mcore.convert.errors import ConvertError
from xlstm_mcore.convert.export.card import snippet
from xlstm_mcore.convert.tokenizer import corpus as tokenizer_corpus
from xlstm_mcore.convert.tokenizer.corpus import SAMPLES, check_equal
from xlstm_mcore.convert.tokenizer.sentencepiece_fast import fast_tokenizer
from xlstm_mcore.convert.tokenizer.write import check_folder, texts_for, write_tokenizer

#: What a model is trained with, and whether it has an exact fast form.
MODELS = {
    "ours": ({}, True),
    "unigram": ({"model_type": "unigram"}, False),
    "dummy prefix": ({"add_dummy_prefix": True}, None),
    "normaliser": ({"normalization_rule_name": "nmt_nfkc"}, None),
    "adopted": (
        {
            "add_dummy_prefix": True,
            "remove_extra_whitespaces": True,
            "normalization_rule_name": "nmt_nfkc",
            "model_type": "unigram",
        },
        False,
    ),
    "no bytes": ({"byte_fallback": False}, None),
    "user-defined": (
        {"user_defined_symbols": ["<|sep|>", "\n", "\n\n", "  ", "\u2581\u2581", "x\u2581"]},
        None,
    ),
}


@pytest.fixture
def few_texts(monkeypatch):
    monkeypatch.setattr(tokenizer_corpus, "TEXTS", 600)


@pytest.mark.parametrize("name", MODELS)
def test_auto_tokenizer_gives_the_ids_of_training(name, tmp_path, few_texts):
    changes, fast = MODELS[name]
    exact = open_tokenizer(train_tokenizer(tmp_path / "t.model", **changes))
    folder = tmp_path / "hf"
    folder.mkdir()
    written = write_tokenizer(exact, folder)
    assert written.auto and written.bos_first
    if fast is not None:
        assert written.remote_code != fast
    assert (folder / "tokenizer.json").exists() != written.remote_code
    found = AutoTokenizer.from_pretrained(folder, trust_remote_code=written.remote_code)
    texts = texts_for(exact)
    assert check_equal(found, exact, texts)
    together = found(texts[:50])["input_ids"]
    assert together == [found(text)["input_ids"] for text in texts[:50]]


def test_a_whole_corpus_of_five_thousand_texts(tmp_path):
    exact = open_tokenizer(train_tokenizer(tmp_path / "t.model"))
    (tmp_path / "hf").mkdir()
    assert not write_tokenizer(exact, tmp_path / "hf").remote_code
    texts = texts_for(exact)
    assert len(texts) == 5000 and set(SAMPLES) <= set(texts)
    everything = "".join(texts)
    assert all(c in everything for c in "\0\u2581\u0416\u05d0\u0e01\u4e2d\uac00") or (
        len(set(everything)) > 3000
    )


def test_other_ids_are_noticed(tmp_path, few_texts):
    """A model with other merges, one more bos, and a decoder that drops spaces."""
    exact = open_tokenizer(train_tokenizer(tmp_path / "t.model"))
    other = open_tokenizer(train_tokenizer(tmp_path / "other.model", vocab_size=400))
    texts = texts_for(exact)
    with pytest.raises(ConvertError, match="other ids"):
        check_equal(fast_tokenizer(other), exact, texts)
    fast = fast_tokenizer(exact)
    body = json.loads(fast.backend_tokenizer.to_str())
    body["decoder"]["decoders"] = body["decoder"]["decoders"][-1:]
    fast._tokenizer = Tokenizer.from_str(json.dumps(body))
    with pytest.raises(ConvertError, match="decodes the ids"):
        check_equal(fast, exact, texts)


def test_a_hugging_face_tokenizer_keeps_its_ids_whatever_its_class(tmp_path, few_texts):
    (tmp_path / "made").mkdir()
    folder = save_hf_tokenizer(tmp_path / "made", make_texts(60))
    for number, changes in enumerate(
        ({}, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True})
    ):
        config = json.loads((folder / "tokenizer_config.json").read_text()) | changes
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        exact = open_tokenizer(folder)
        out = tmp_path / str(number)
        out.mkdir()
        written = write_tokenizer(exact, out)
        assert written.auto and not written.remote_code
        assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        found = AutoTokenizer.from_pretrained(out)
        for text in texts_for(exact):
            ids = found(text, add_special_tokens=False)["input_ids"]
            assert ids == exact.encode([text])[0].tolist()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_snippet_of_the_card_gives_the_ids_in_a_process_of_its_own(tmp_path, kind, few_texts):
    """Without this project: `transformers` alone, and the class that travels with the folder."""
    exact = open_tokenizer(train_tokenizer(tmp_path / "t.model", model_type=kind))
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "xlstm_blocks"}))
    written = write_tokenizer(exact, folder)
    lines = snippet(True, written, exact.bos_id).splitlines()
    load = next(line for line in lines if line.startswith("tokenizer = "))
    code = f"FOLDER = {str(folder)!r}\nfrom transformers import AutoTokenizer\n{load}\n"
    code += "import json, sys\nprint(json.dumps(tokenizer(json.load(sys.stdin))['input_ids']))"
    texts = [*SAMPLES, *make_texts(5)]
    result = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    wanted = [[exact.bos_id, *ids.tolist()] for ids in exact.encode(texts)]
    assert json.loads(result.stdout.splitlines()[-1]) == wanted
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    assert wanted[2][1:] == sp.encode(texts[2])


def test_check_folder_says_what_transformers_cannot_load(tmp_path, few_texts):
    exact = open_tokenizer(train_tokenizer(tmp_path / "t.model"))
    (tmp_path / "hf").mkdir()
    write_tokenizer(exact, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{")
    with pytest.raises(ConvertError, match="transformers cannot load it"):
        check_folder(tmp_path / "hf", exact, remote_code=False)
