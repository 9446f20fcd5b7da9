"""Shards, prompts and exports have the same ids of a text, whatever tokenizer made them."""

import shutil

import pytest
from transformers import AutoTokenizer

from data_prep.tools.repack import stored_documents
from tests.data_prep.small_corpus import make_texts, run, save_hf_tokenizer, write_jsonl
from xlstm_io.shards.manifest import load_manifest
from xlstm_io.tokenizer import open_tokenizer
from xlstm_mcore.convert.tokenizer.write import write_tokenizer

TEXTS = [
    "\u2581",
    "\u2581\u2581 x\u2581y z\u2581\n\u2581",
    " \u2581 between spaces \u2581 ",
    "a\0b \0",
    "a" + " " * 300 + "b" + " " * 7,
    "\n" * 40 + "\t\t\r\n x",
    "<s> </s> <pad> <unk> <0x41> <|end|> <|user|> spelled out",
    "na\u00efve e\u0301 \u0435\u0449\u0451 \u039a\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1",
    "\u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e9\u05dc\u05d5\u05dd "
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f469\u200d\U0001f467 \U0001d54f \U0010ffff \ufeff\u00a0\u3000\u2028",
    *make_texts(60),
]


@pytest.fixture(scope="module", params=["bpe", "unigram", "adopted_bpe", "hugging_face"])
def shards(request, tmp_path_factory):
    """Shards of TEXTS, in order, by a tokenizer of each kind."""
    root = tmp_path_factory.mktemp(request.param)
    corpus = write_jsonl(root / "corpus.jsonl", TEXTS)
    if request.param == "hugging_face":
        (root / "hf").mkdir()
        flags = ["--from-hf", save_hf_tokenizer(root / "hf", TEXTS), "--bos-token", "<|end|>"]
    else:
        kind = request.param.removeprefix("adopted_")
        flags = ["--input", corpus, "--vocab-size", 370, "--model-type", kind]
        flags += ["--special-tokens", "<|user|>"]
    assert run("tokenizer", *flags, "--out", root / "made") == 0
    if request.param == "adopted_bpe":
        flags = ["--from-model", root / "made/tokenizer.model"]
        assert run("tokenizer", *flags, "--out", root / "tok") == 0
    else:
        (root / "made").rename(root / "tok")
    flags = ["--seq-len", 64, "--valid-fraction", 0, "--workers", 1, "--out", root / "shards"]
    assert run("build", "--input", corpus, "--tokenizer", root / "tok", *flags) == 0
    return root / "shards"


def ids_of_shards(shards) -> list[list[int]]:
    """The ids of every document as they are stored: [bos] tokens [eos]."""
    manifest = load_manifest(shards)
    return [
        document.tolist()
        for entry in manifest.shards("train")
        for document in stored_documents(manifest, entry)
    ]


def test_prompts_have_the_ids_of_the_shards(shards):
    tokenizer = open_tokenizer(load_manifest(shards).tokenizer_path)
    eos = tokenizer.document_ids().eos
    for text, stored in zip(TEXTS, ids_of_shards(shards), strict=True):
        assert [*tokenizer.prompt_ids(text), eos] == stored, text
        assert tokenizer.decode(stored) == text


def test_an_exported_folder_has_the_ids_of_the_shards(shards, tmp_path):
    written = write_tokenizer(open_tokenizer(load_manifest(shards).tokenizer_path), tmp_path)
    exported = open_tokenizer(tmp_path)
    bos, eos = exported.bos_id, exported.eos_id
    stored = ids_of_shards(shards)
    assert [[bos, *ids.tolist(), eos] for ids in exported.encode(TEXTS)] == stored
    by_transformers = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=written.remote_code)
    for text, ids in zip(TEXTS, stored, strict=True):
        assert by_transformers(text, add_special_tokens=False)["input_ids"] == ids[1:-1], text


def test_texts_have_the_same_ids_alone_and_together(shards):
    tokenizer = open_tokenizer(load_manifest(shards).tokenizer_path)
    together = [ids.tolist() for ids in tokenizer.encode(TEXTS)]
    assert together == [open_tokenizer(tokenizer.path).encode([text])[0].tolist() for text in TEXTS]


def test_a_copied_tokenizer_is_the_same_one(shards, tmp_path):
    copy = open_tokenizer(shutil.copytree(shards / "tokenizer", tmp_path / "tokenizer"))
    assert copy.sha256 == load_manifest(shards).tokenizer_sha256
    assert list(copy.files) == sorted(path.name for path in (shards / "tokenizer").iterdir())
