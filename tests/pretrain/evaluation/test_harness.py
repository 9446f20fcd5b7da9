"""`downstream`: what lm-evaluation-harness finds is what `evaluate` and the model's logits say.

CI runs this with the harness in the environment of `make test-peers`.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import yaml

from pretrain import cli
from pretrain.checkpoint import TensorSlice, save_checkpoint
from pretrain.data import open_valid
from pretrain.evaluation.losses import measure
from tests.data_prep.small_corpus import documents_of, make_texts, run, write_jsonl
from tests.pretrain.run_files import config
from tests.xlstm_mcore.test_generation_state import make_model
from xlstm_io.tokenizer import open_tokenizer
from xlstm_mcore.inference import model_logits
from xlstm_mcore.parameters.slices import named_slices

pytest.importorskip("lm_eval", reason="lm-eval is not installed; see the extra eval")

SEQ_LEN = 512  # no document is cut
ITEMS = 20


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """(folder, model, texts): a checkpoint, shards of the texts, and tasks of them in YAML."""
    root = tmp_path_factory.mktemp("harness")
    corpus = write_jsonl(root / "corpus.jsonl", make_texts(120))
    assert run("tokenizer", "--input", corpus, "--vocab-size", 400, "--out", root / "tok") == 0
    flags = ["--input", corpus, "--tokenizer", root / "tok", "--out", root / "shards"]
    flags += ["--seq-len", SEQ_LEN, "--valid-fraction", 0.25, "--packing", "best_fit"]
    assert run("build", *flags, "--workers", 1) == 0
    texts = documents_of(root / "shards", "valid")
    assert len(texts) >= ITEMS
    model = make_model("Mms*", vocab_size=448, vocab_tokens=400)
    parts = [
        TensorSlice(p.name, p.global_shape, p.global_offset, p.local(parameter.detach()))
        for _, parameter, slices in named_slices(model)
        for p in slices
    ]
    tokenizer = open_tokenizer(root / "tok")
    state = {"tokenizer": {"sha256": tokenizer.sha256}}
    saved = {"model": model.config.model.model_dump(mode="json")}
    save_checkpoint(root / "run", parts, state, saved, step=3, files=tokenizer.files)
    (root / "tasks").mkdir()
    lines = [json.dumps({"text": text}) for text in texts]
    (root / "texts.jsonl").write_text("\n".join(lines))
    choices = [" gate", " cell", " loop x"]
    lines = [json.dumps({"q": text[:30], "choices": choices, "n": 1}) for text in texts[:ITEMS]]
    (root / "choices.jsonl").write_text("\n".join(lines))
    tasks = {
        "own_texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "own_choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "choices",
            "target_delimiter": "",
            "doc_to_target": "n",
            "metric_list": [{"metric": "acc"}],
        },
        "own_answers": {
            "output_type": "generate_until",
            "doc_to_text": "{{q}}",
            "doc_to_target": "gate",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in tasks.items():
        file = root / ("texts.jsonl" if name == "own_texts" else "choices.jsonl")
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
        whole = {"task": name, "test_split": "test", **data, **task}
        (root / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(whole))
    return root, model, texts


@pytest.fixture(scope="module")
def lm(work):
    from pretrain.evaluation.harness import CheckpointLM

    root, model, _ = work
    return CheckpointLM(model, open_tokenizer(root / "tok"), batch=6)


def requests(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


def test_loglikelihoods_are_those_of_evaluate(work, lm):
    root, model, texts = work
    run_config = config(data__path=str(root / "shards"), data__seq_len=SEQ_LEN, data__micro_batch=2)
    (dataset,) = open_valid(run_config.data).values()
    measured = measure(model, dataset, run_config)
    rolling = lm.loglikelihood_rolling(requests(*((text,) for text in texts)), True)
    ends = lm._loglikelihood_tokens(
        [(None, lm.tok_encode(text), [lm.eot_token_id]) for text in texts], True
    )
    total = sum(rolling) + sum(likely for likely, _ in ends)
    tokens = sum(len(lm.tok_encode(text)) for text in texts)  # bos is not predicted, eos is
    assert measured.sum.tokens == tokens
    assert -total == pytest.approx(measured.sum.total, rel=1e-5)


def test_a_continuation_is_scored_after_its_context(work, lm):
    _, model, texts = work
    context, continuation = texts[0][:20] + " ", "loop gate"
    ids = torch.tensor([lm.tok_encode(context + continuation)])
    begin = len(lm.tok_encode(context.rstrip()))
    likely = model_logits(model, ids)[0, :, :400].double().log_softmax(1)
    true = sum(likely[n - 1, ids[0, n]].item() for n in range(begin, ids.shape[1]))
    asked = requests((context, continuation), ("", continuation), (context, continuation))
    (got, _), (alone, _), again = lm.loglikelihood(asked, True)
    assert got == again[0] == pytest.approx(true, rel=1e-5)
    assert alone == pytest.approx(lm.loglikelihood_rolling(requests((continuation,)), True)[0])


def test_texts_are_continued_greedily_until_a_stop_text(work, lm):
    kwargs = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    (free,) = lm.generate_until(requests(("x = 1", {"max_gen_toks": 12})), True)
    (cut,) = lm.generate_until(requests(("x = 1", kwargs)), True)
    assert cut == free.split("\n")[0] and free
    part = free[len(free) // 2 :]
    (stopped,) = lm.generate_until(requests(("x = 1", {**kwargs, "until": part})), True)
    assert stopped == free[: free.index(part)].split("\n")[0] or part in cut


def test_the_command_runs_a_local_task(work, tmp_path, capsys):
    root, model, texts = work
    out = tmp_path / "results.json"
    words = ["downstream", str(root / "run"), "--include", str(root / "tasks"), "--out", str(out)]
    assert cli.run([*words, "--tasks", "own_texts,own_choices,own_answers"]) == 0
    shown = capsys.readouterr().out
    assert "own_texts" in shown and "bits_per_byte" in shown and "own_answers" in shown
    found = json.loads(out.read_text())["results"]
    tokenizer = open_tokenizer(root / "tok")
    nats = 0.0
    for text in texts:
        ids = torch.tensor([tokenizer.prompt_ids(text)])
        likely = model_logits(model, ids)[0, :-1, :400].double().log_softmax(1)
        nats -= likely.gather(1, ids[0, 1:, None]).sum().item()
    size = sum(len(text.encode()) for text in texts)
    got = found["own_texts"]["bits_per_byte,none"]
    assert got == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert 0 <= found["own_choices"]["acc,none"] <= 1


def test_a_task_that_is_not_there_is_named(work, capsys):
    root, *_ = work
    assert cli.run(["downstream", str(root / "run"), "--tasks", "no_such_task"]) == 2
    assert "the harness knows no no_such_task" in capsys.readouterr().err
    gone = {"task": "gone", "dataset_path": "json", "test_split": "test"}
    gone |= {"dataset_kwargs": {"data_files": {"test": str(root / "nothing.jsonl")}}}
    gone |= {"output_type": "multiple_choice", "doc_to_text": "q", "doc_to_choice": "c"}
    (root / "more").mkdir()
    (root / "more" / "gone.yaml").write_text(yaml.safe_dump({**gone, "doc_to_target": "n"}))
    words = ["downstream", str(root / "run"), "--tasks", "gone", "--include", str(root / "more")]
    assert cli.run(words) == 2
    assert "--tasks gone: the data cannot be opened" in capsys.readouterr().err
