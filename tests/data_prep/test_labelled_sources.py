"""Sources that say which parts of a text are learnt."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.tools.repack import stored_documents
from tests.data_prep.small_corpus import documents_of, run, tree_bytes
from xlstm_io.shards.manifest import load_manifest
from xlstm_io.shards.rows import no_label
from xlstm_io.tokenizer import open_tokenizer

PAIRS = [
    {"prompt": f"loop {n} cell =", "completion": f" state {n}\n" + "gate x = 1\n" * (n % 7)}
    for n in range(60)
]
DIALOGUES = [
    [("def", False), (f" return {n}", True), ("\n# loop", False), (" cell" * (n % 9), n % 2 == 0)]
    for n in range(50)
]
SEGMENTS = [
    {"segments": [{"text": text, "loss": loss} for text, loss in parts]} for parts in DIALOGUES
]
PROMPTS = ["--prompt-field", "prompt", "--completion-field", "completion"]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def build(tokenizer_dir, tmp_path):
    """A build into `tmp_path / "out"`; its exit code."""

    def build(*words):
        flags = ["--tokenizer", tokenizer_dir, "--seq-len", 16, "--valid-fraction", 0.2]
        flags += ["--shard-mb", 0.002, "--workers", 1, "--out", tmp_path / "out"]
        return run("build", *words, *flags)

    return build


def learnt_texts(out):
    """Text and learnt parts of every document, and whether its eos is learnt."""
    manifest = load_manifest(out)
    tokenizer = open_tokenizer(manifest.tokenizer_path)
    found = []
    for split in ("train", "valid"):
        for entry in manifest.shards(split):
            for tokens, labels in stored_documents(manifest, entry):
                given = labels != no_label(labels.dtype)
                assert (labels[:-1][given[:-1]] == tokens[1:][given[:-1]]).all() and not given[-1]
                learnt = tokenizer.decode(tokens[1:][given[:-1]])
                found.append((tokenizer.decode(tokens[1:-1]), learnt, bool(given[-2])))
    return sorted(found)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_completions_are_learnt_with_the_end_and_prompts_are_not(build, packing, tmp_path):
    corpus = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    assert build("--input", corpus, *PROMPTS, "--packing", packing) == 0
    out = tmp_path / "out"
    assert run("verify", out, "--full") == 0
    assert learnt_texts(out) == sorted(
        (pair["prompt"] + pair["completion"], pair["completion"], True) for pair in PAIRS
    )
    manifest = load_manifest(out)
    assert manifest.labels
    assert run("repack", out, "--seq-len", 40, "--out", tmp_path / "again", "--workers", 1) == 0
    assert learnt_texts(tmp_path / "again") == learnt_texts(out)


def test_segments_with_a_loss_are_learnt(build, tmp_path, capsys):
    corpus = write_lines(tmp_path / "dialogues.jsonl", SEGMENTS)
    assert build("--input", corpus, "--segments-field", "segments") == 0
    expected = [
        ("".join(t for t, _ in parts), "".join(t for t, loss in parts if loss), parts[-1][1])
        for parts in DIALOGUES
    ]
    assert learnt_texts(tmp_path / "out") == sorted(expected)
    assert run("inspect", tmp_path / "out", "--row", 0) == 0
    assert "    labels of " in capsys.readouterr().out


def test_texts_beside_them_are_learnt_whole(tokenizer_dir, corpus, texts, tmp_path):
    pairs = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    sources = [
        {"name": "pairs", "input": str(pairs), "prompt_field": "prompt"},
        {"name": "plain", "input": str(corpus)},
    ]
    sources[0]["completion_field"] = "completion"
    settings = tmp_path / "prep.yaml"
    out = tmp_path / "out"
    settings.write_text(json.dumps({"sources": sources, "tokenizer": str(tokenizer_dir)}))
    flags = ["--out", out, "--seq-len", 16, "--valid-fraction", 0.2, "--workers", 1]
    assert run("build", settings, *flags) == 0
    assert run("verify", out, "--full") == 0
    manifest = load_manifest(out)
    plain = manifest.sources[1].splits["train"]
    assert plain.targets == plain.tokens - plain.docs
    assert sorted(documents_of(out, "train", "plain") + documents_of(out, "valid", "plain")) == (
        sorted(set(texts))
    )


def test_the_same_text_learnt_elsewhere_is_another_document(build, tmp_path):
    records = [
        {"prompt": "loop", "completion": " cell state"},
        {"prompt": "loop cell", "completion": " state"},
        {"prompt": "loop", "completion": " cell state"},
        *PAIRS,
    ]
    assert build("--input", write_lines(tmp_path / "pairs.jsonl", records), *PROMPTS) == 0
    found = [
        learnt for text, learnt, _ in learnt_texts(tmp_path / "out") if text.startswith("loop c")
    ]
    assert found == [" cell state", " state"]
    assert load_manifest(tmp_path / "out").sources[0].dropped["duplicate"] == 1


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "loop"}, "no text in field 'completion'; it has: prompt"),
        ({"prompt": 3, "completion": "x"}, "no text in field 'prompt'"),
    ],
)
def test_a_record_without_both_is_malformed(build, record, reason, tmp_path):
    corpus = write_lines(tmp_path / "pairs.jsonl", [*PAIRS, record])
    assert build("--input", corpus, *PROMPTS, "--max-bad-share", 0.1) == 0
    log = (tmp_path / "out" / "_work" / "malformed.log").read_text()
    assert f"pairs.jsonl:{len(PAIRS) + 1}" in log and reason in log


@pytest.mark.parametrize(
    "segments", [None, [], "text", [{"text": "x"}], [{"text": "x", "loss": 1}], [["x", True]]]
)
def test_segments_that_are_none_are_malformed(build, segments, tmp_path):
    corpus = write_lines(tmp_path / "dialogues.jsonl", [*SEGMENTS, {"segments": segments}])
    flags = ["--segments-field", "segments", "--max-bad-share", 0.1]
    assert build("--input", corpus, *flags) == 0
    assert "segment" in (tmp_path / "out" / "_work" / "malformed.log").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (PROMPTS[:2], "prompt_field and completion_field belong together"),
        ([*PROMPTS, "--segments-field", "x"], "give either prompt_field and completion_field, or"),
    ],
)
def test_fields_that_contradict_each_other(build, flags, message, tmp_path, capsys):
    corpus = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    assert build("--input", corpus, *flags) == 2
    assert message in capsys.readouterr().err


def test_prompts_are_read_from_tables_as_from_lines(build, tmp_path, capsys):
    pq.write_table(pa.Table.from_pylist(PAIRS), tmp_path / "pairs.parquet", row_group_size=20)
    assert build("--input", tmp_path / "pairs.parquet", *PROMPTS) == 0
    assert learnt_texts(tmp_path / "out") == sorted(
        (pair["prompt"] + pair["completion"], pair["completion"], True) for pair in PAIRS
    )
    shutil.rmtree(tmp_path / "out")
    flags = ["--prompt-field", "prompt", "--completion-field", "answer"]
    assert build("--input", tmp_path / "pairs.parquet", *flags) == 2
    assert (
        "no column 'answer'; set --prompt-field and --completion-field" in capsys.readouterr().err
    )
    assert build("--input", tmp_path / "pairs.parquet", "--segments-field", "prompt") == 2
    assert "segments are read from JSON lines alone" in capsys.readouterr().err


def test_a_text_file_has_no_prompts(build, tmp_path, capsys):
    (tmp_path / "corpus.txt").write_text("loop cell")
    assert build("--input", tmp_path / "corpus.txt", *PROMPTS) == 2
    assert "a text file has no fields for prompts" in capsys.readouterr().err


def test_jobs_and_joined_folders_keep_labels(tokenizer_dir, tmp_path):
    corpus = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    flags = ["--input", corpus, *PROMPTS, "--tokenizer", tokenizer_dir, "--seq-len", 16]
    flags += ["--valid-fraction", 0.2, "--shard-mb", 0.002, "--workers", 1]
    assert run("build", *flags, "--out", tmp_path / "one") == 0
    for task in (0, 1):
        assert run("build", *flags, "--out", tmp_path / "two", "--task", task, "--tasks", 2) == 0
    assert run("merge", tmp_path / "two") == 0
    assert tree_bytes(tmp_path / "one") == tree_bytes(tmp_path / "two")

    others = [{**pair, "prompt": f"other {pair['prompt']}"} for pair in PAIRS]
    flags[1] = write_lines(tmp_path / "others.jsonl", others)
    assert run("build", *flags, "--out", tmp_path / "others", "--source", "others") == 0
    joined = tmp_path / "joined"
    assert run("merge", joined, "--inputs", tmp_path / "one", tmp_path / "others") == 0
    assert run("verify", joined, "--full") == 0
    assert load_manifest(joined).labels
    both = learnt_texts(tmp_path / "one") + learnt_texts(tmp_path / "others")
    assert learnt_texts(joined) == sorted(both)
