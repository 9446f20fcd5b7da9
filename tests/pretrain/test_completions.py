"""Prompts and completions, from a file of records to a step that learns the completions alone."""

import json

import pytest
import torch

from pretrain import cli, layout
from pretrain.watching.metrics import read_metrics
from tests.data_prep import small_corpus
from xlstm_io.shards.manifest import load_manifest
from xlstm_mcore.inference import load_model, model_logits

PAIRS = [
    {"prompt": f"loop {n} cell" * (1 + n % 3), "completion": f" state {n}" + " gate" * (n % 7)}
    for n in range(40)
]
DIALOGUES = [
    [("def", False), (f" return {n}", True), ("\n# loop", False), (" cell" * (1 + n % 4), True)]
    for n in range(30)
]
# A step of this rate leaves the weights as they are.
RUN = """\
run: {dir: RUN, steps: 1, seed: 1}
model: {pattern: "ms*", hidden_size: 16, num_heads: 2, vocab_size: 330}
data: {path: shards, seq_len: 64, global_batch: ROWS, micro_batch: 1}
optimizer: {lr: 1.0e-30}
schedule: {name: constant}
checkpoint: {interval: 1}
logging: {interval: 1, tensorboard: false}
"""


@pytest.mark.parametrize("kind", ["pairs", "dialogues"])
def test_a_step_has_the_mean_loss_of_the_learnt_tokens(kind, tmp_path, monkeypatch):
    """Every document by itself: no packing, no boundaries, no labels from shards."""
    monkeypatch.chdir(tmp_path)
    texts = small_corpus.make_texts()
    corpus = small_corpus.write_jsonl(tmp_path / "texts.jsonl", texts)
    tokenizer_flags = ["--input", corpus, "--vocab-size", 330, "--out", "tok"]
    assert small_corpus.run("tokenizer", *tokenizer_flags) == 0
    if kind == "pairs":
        records = PAIRS
        documents = [[(p["prompt"], False), (p["completion"], True)] for p in PAIRS]
        fields = ["--prompt-field", "prompt", "--completion-field", "completion"]
    else:
        records = [{"segments": [{"text": t, "loss": x} for t, x in d]} for d in DIALOGUES]
        documents, fields = DIALOGUES, ["--segments-field", "segments"]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    flags = ["--input", "records.jsonl", "--tokenizer", "tok", "--out", "shards", "--workers", 1]
    flags += ["--seq-len", 64, "--packing", "best_fit", "--valid-fraction", 0.2]
    assert small_corpus.run("build", *fields, *flags) == 0
    rows = sum(entry.rows for entry in load_manifest("shards").shards("train"))
    trained = small_corpus.documents_of("shards", "train")
    documents = [parts for parts in documents if "".join(text for text, _ in parts) in trained]
    assert rows < len(documents) == len(trained), "documents share rows"
    (tmp_path / "run.yaml").write_text(RUN.replace("ROWS", str(rows)))
    layout.leave()
    assert cli.run(["train", "run.yaml"]) == 0
    layout.leave()

    model, tokenizer = load_model("RUN")
    total, learnt = 0.0, 0
    for parts in documents:
        ids, counts = tokenizer.prompt_ids(""), [False]
        for text, loss in parts:
            tokens = tokenizer.encode([text])[0].tolist()
            ids, counts = ids + tokens, counts + [loss] * len(tokens)
        ids, counts = [*ids, tokenizer.eos_id], [*counts, parts[-1][1]]
        logits = model_logits(model, torch.tensor([ids[:-1]]))[0].double()
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        asked = torch.tensor(counts[1:])
        total, learnt = total + float(losses[asked].sum()), learnt + int(asked.sum())
    (step,) = [
        record for record in read_metrics(tmp_path / "RUN/metrics.jsonl") if "loss" in record
    ]
    assert step["loss"] == pytest.approx(total / learnt, rel=1e-5)
    targets = sum(entry.targets for entry in load_manifest("shards").shards("train"))
    assert targets == learnt
