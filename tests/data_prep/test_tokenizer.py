import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.sources.documents import Fields
from data_prep.tools.train_tokenizer import sample_texts
from tests.data_prep.small_corpus import make_texts, run, write_jsonl
from xlstm_io.errors import TokenizerFileError
from xlstm_io.tokenizer import DocumentIds, open_tokenizer


def test_ids_and_lossless_round_trip(tokenizer_dir, texts):
    tokenizer = open_tokenizer(tokenizer_dir)
    assert tokenizer.document_ids() == DocumentIds(bos=0, eos=2, pad=1)
    assert tokenizer.vocab_size == 330
    awkward = [
        "",
        " ",
        "  a  b ",
        "\n\n\t\t\n",
        "a\r\nb",
        "▁",
        "x▁▁ y▁",
        "日本語\n",
        "a\0b",
        "<s></s>\u200b",
    ]
    for text, ids in zip(texts + awkward, tokenizer.encode(texts + awkward), strict=True):
        assert tokenizer.decode(ids) == text
        assert not {0, 1, 2, 3} & set(ids)  # text never yields a control id


def test_newline_is_one_symbol(tokenizer_dir):
    tokenizer = open_tokenizer(tokenizer_dir)
    (ids,) = tokenizer.encode(["\n\n\n"])
    assert len(ids) == 3 and len(set(ids)) == 1


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_deterministic_and_rerun_is_a_no_op(tmp_path, corpus, model_type, capsys):
    flags = ["--input", corpus, "--vocab-size", 310, "--model-type", model_type]
    for name in ("a", "b"):
        assert run("tokenizer", *flags, "--out", tmp_path / name) == 0
    first, second = (tmp_path / name / "tokenizer.model" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    stamp = first.stat().st_mtime_ns
    assert run("tokenizer", *flags, "--out", tmp_path / "a") == 0
    assert first.stat().st_mtime_ns == stamp
    assert "nothing to do" in capsys.readouterr().out


def test_too_small_corpus_is_one_message(tmp_path, corpus, capfd):
    flags = ["--input", corpus, "--out", tmp_path / "t"]
    assert run("tokenizer", *flags, "--vocab-size", 100_000) == 2
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and "use --vocab-size" in message and ".cc" not in message
    assert run("tokenizer", *flags, "--vocab-size", 100) == 2
    assert "or more" in capfd.readouterr().err
    assert not (tmp_path / "t").exists()


def test_other_settings_do_not_overwrite(tmp_path, corpus, capsys):
    flags = ["--input", corpus, "--out", tmp_path / "t"]
    assert run("tokenizer", *flags, "--vocab-size", 310) == 0
    before = (tmp_path / "t/tokenizer.model").read_bytes()
    assert run("tokenizer", *flags, "--vocab-size", 320) == 2
    assert "vocab_size" in capsys.readouterr().err
    assert (tmp_path / "t/tokenizer.model").read_bytes() == before


def test_another_split_of_text_files_is_another_corpus(tmp_path, texts, capsys):
    (tmp_path / "corpus.txt").write_text("\n".join(texts))
    flags = ["--input", tmp_path / "corpus.txt", "--vocab-size", 310, "--out", tmp_path / "t"]
    assert run("tokenizer", *flags) == 0
    assert run("tokenizer", *flags, "--text-split", "lines") == 2
    assert "other text_split" in capsys.readouterr().err
    info = tmp_path / "t/tokenizer_info.json"  # of an older version:
    fields = json.loads(info.read_text())
    del fields["settings"]["text_split"]
    info.write_text(json.dumps(fields))
    assert run("tokenizer", *flags) == 0
    assert run("tokenizer", *flags, "--text-split", "lines") == 2
    assert "other contents" in capsys.readouterr().err


def test_same_contents_are_a_no_op_and_others_an_error(tmp_path, corpus, texts, capsys):
    flags = ["--vocab-size", 310, "--out", tmp_path / "t"]
    copy = write_jsonl(tmp_path / "copy.jsonl", texts)
    assert run("tokenizer", "--input", corpus, *flags) == 0
    assert run("tokenizer", "--input", copy, *flags) == 0
    assert "same contents: nothing to do" in capsys.readouterr().out
    write_jsonl(copy, texts[1:])
    assert run("tokenizer", "--input", copy, *flags) == 2
    assert "other contents" in capsys.readouterr().err


def test_a_foreign_model_is_never_overwritten(tmp_path, corpus, capsys):
    (tmp_path / "tokenizer.model").write_bytes(b"precious")
    assert run("tokenizer", "--input", corpus, "--vocab-size", 310, "--out", tmp_path) == 2
    assert "was not made by this command" in capsys.readouterr().err
    assert (tmp_path / "tokenizer.model").read_bytes() == b"precious"


def test_killed_before_the_model_was_written(tmp_path, corpus):
    flags = ["--input", corpus, "--vocab-size", 310, "--out", tmp_path]
    assert run("tokenizer", *flags) == 0
    model = (tmp_path / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").unlink()
    assert run("tokenizer", *flags) == 0
    assert (tmp_path / "tokenizer.model").read_bytes() == model


def test_not_a_model(tmp_path):
    with pytest.raises(TokenizerFileError, match=r"tokenizer\.model: No such file"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"garbage")
    with pytest.raises(TokenizerFileError, match="not a SentencePiece model"):
        open_tokenizer(tmp_path)


def test_a_model_with_a_piece_that_is_no_text_is_refused(tokenizer_dir, tmp_path):
    """SentencePiece takes it, and raises when a model generates the piece."""
    data = (tokenizer_dir / "tokenizer.model").read_bytes()
    piece = open_tokenizer(tokenizer_dir).token(300).encode()
    assert data.count(piece) and len(piece) > 1
    (tmp_path / "tokenizer.model").write_bytes(data.replace(piece, b"\x80" * len(piece)))
    with pytest.raises(TokenizerFileError, match="is not a SentencePiece model"):
        open_tokenizer(tmp_path)


def test_sample_is_bounded_and_independent_of_order(tmp_path):
    texts = make_texts(200)
    forward = write_jsonl(tmp_path / "a.jsonl", texts)
    backward = write_jsonl(tmp_path / "b.jsonl", texts[::-1])
    limit = sum(len(t.encode()) for t in texts) // 3
    sample, documents, total = sample_texts([str(forward)], Fields(), limit)
    assert sample == sample_texts([str(backward)], Fields(), limit)[0]
    assert documents == 200 and total > 2 * limit
    assert limit // 2 < sum(len(t.encode()) for t in sample) <= limit


@pytest.mark.parametrize("kind", ["unigram", "words", "plain eos"])
def test_a_text_that_spells_a_control_token_does_not_yield_it(kind, tmp_path):
    """Vocabularies of whole words have `</s>`, and some files do not call their eos special."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer, trainer = {
        "unigram": (models.Unigram(), trainers.UnigramTrainer(unk_token="<unk>", vocab_size=90)),
        "words": (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer()),
        "plain eos": (models.BPE(unk_token="<unk>"), trainers.BpeTrainer(vocab_size=90)),
    }[kind]
    fast, trainer.special_tokens, trainer.show_progress = Tokenizer(tokenizer), special, False
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    fast.decoder = decoders.Metaspace(prepend_scheme="never")
    if kind == "words":
        fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.train_from_iterator(["some <b>text</i> of words / and / signs"] * 20, trainer)
    fields = json.loads(fast.to_str())
    for token in fields["added_tokens"]:
        token["special"] = kind != "plain eos"
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    opened = open_tokenizer(tmp_path)
    texts = ["</s>", "a </s> b<s>", "<s> <s> </s> <pad>", "text of words", "some unknown: \u00e4"]
    found = [ids.tolist() for ids in opened.encode(texts)]
    assert not {opened.bos_id, opened.eos_id, opened.pad_id} & {n for ids in found for n in ids}
    assert found[3:] == [item.ids for item in fast.encode_batch(texts[3:])]
    if kind != "words":  # which has no signs
        assert opened.decode(found[1]) == texts[1]
    assert opened.vocab_size == fast.get_vocab_size()
    opened._tokenizer = None
    assert opened.vocab_size  # asked for once: the library makes a dictionary of all tokens
