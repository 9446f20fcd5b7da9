"""`evaluation.prompts`: on every layout the texts of one process, in log, file and report."""

import json

import pytest

import pretrain.cli
import pretrain.commands.run.train
from pretrain.config import config_from_dict
from pretrain.evaluation.sample_file import Sample, append_samples, read_samples
from pretrain.report.page import write_page
from pretrain.report.runs import read_run
from pretrain.run_folder import life_logs
from tests.dist import work
from tests.dist.needs import needs_deepspeed
from tests.dist.training_runs import tiny_run

TEXTS = [[5, 17, 3], [40], [9, 9, 31, 2, 77, 60, 8]]
LAYOUTS = {
    "tp2_sp_pp2": (4, {"layout__tensor": 2, "layout__sequence": True, "layout__pipeline": 2}),
    "cp2_dp2": (4, {"layout__context": 2}),
    "vpp2": (2, {"layout__pipeline": 2, "layout__virtual": 2}),
}
ZERO_3 = (2, {"engine__name": "deepspeed", "engine__zero_stage": 3})


def continued(config):
    """The texts with six more tokens each, which differ from row to row."""
    engine, _ = work.make_engine(config)
    texts = [list(text) for text in TEXTS]
    for _ in range(6):
        for text, token in zip(texts, engine.next_tokens(texts), strict=True):
            text.append(token)
    return texts


@pytest.fixture(scope="module")
def one_process(pool):
    (texts,) = pool(1, continued, work.run_config("mixed", model__vocab_tokens=90))
    assert len({tuple(text[-6:]) for text in texts}) == len(texts)
    assert max(map(max, texts)) < 90
    return texts


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "changes"),
    [*LAYOUTS.values(), pytest.param(*ZERO_3, marks=needs_deepspeed)],
    ids=[*LAYOUTS, "zero3"],
)
def test_every_layout_continues_like_one_process(pool, one_process, ranks, changes):
    config = work.run_config("mixed", model__vocab_tokens=90, **changes)
    assert pool(ranks, continued, config) == [one_process] * ranks


def train(raw):
    return pretrain.commands.run.train.main(config_from_dict(raw))


@pytest.mark.dist
def test_a_run_tells_how_its_prompts_go_on(pool, shards, tmp_path, capfd):
    prompts = ["return loop", "gate"]
    changes = {"evaluation__prompts": prompts, "evaluation__prompt_tokens": 5}
    raw = tiny_run(tmp_path, shards, run__steps=9, **changes)
    assert pool(2, train, raw) == [0, 0]
    log = life_logs(tmp_path, 1) / "rank_0.log"
    assert "'return loop' goes on: " in log.read_text(encoding="utf-8")
    found = read_samples(tmp_path)
    assert [(one.step, one.prompt) for one in found] == [(9, prompt) for prompt in prompts]
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [8, 8, 9, 9]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    words = ["generate", str(tmp_path), *words, "--temperature", "0", "--max-tokens", "5"]
    assert pretrain.cli.run([*words, "--json"]) == 0
    generated = [json.loads(line)["text"] for line in capfd.readouterr().out.splitlines()]
    assert [one.text for one in found] == generated
    page = write_page([read_run(tmp_path)])
    assert "Samples of the newest evaluation" in page and "<td>return loop</td>" in page
    raw["evaluation"]["prompts"] = ["gate " * 40]
    raw["run"]["dir"] = str(tmp_path / "other")
    with pytest.raises(AssertionError, match="does not fit into"):
        pool(1, train, raw)


def test_a_step_that_is_taken_twice_counts_once(tmp_path):
    assert read_samples(tmp_path) == []
    first, second = Sample(4, "a", "x"), Sample(8, "a", "y")
    append_samples(tmp_path, [first, second, Sample(8, "b", "z")])
    append_samples(tmp_path, [Sample(8, "a", "w")])
    with open(tmp_path / "samples.jsonl", "a") as file:
        file.write('{"step": 8, "pro')
    assert read_samples(tmp_path) == [Sample(8, "a", "w"), Sample(8, "b", "z")]
