"""The way from a Hugging Face folder to a run: docs/continued-pretraining.md, at a tiny size."""

import json

import yaml
from safetensors.torch import save_file

from pretrain import cli
from tests.data_prep.small_corpus import make_texts, run, save_hf_tokenizer, write_jsonl
from tests.dist.training_runs import tiny_run
from tests.xlstm_mcore.convert.test_import import model_of, random_tensors
from xlstm_mcore.convert import cli as convert
from xlstm_mcore.convert.families import native_xlstm


def test_a_run_starts_from_a_folder_as_the_7b_is_published(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = make_texts(60)
    (tmp_path / "hf").mkdir()
    save_hf_tokenizer(tmp_path / "hf", texts)
    file = tmp_path / "hf/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token": "<|end|>"}))
    model = model_of("MM", vocab_size=448)
    save_file(random_tensors(native_xlstm.TABLE, model)[1], tmp_path / "hf/model.safetensors")
    config = native_xlstm.config(model) | {"vocab_size": 448}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))

    assert convert.main(["from-hf", "hf", "--dry-run"]) == 0
    assert convert.main(["from-hf", "hf", "imported"]) == 0
    said = capsys.readouterr().out
    section = yaml.safe_load(said[said.index("model:\n") : said.index("wrote ")])
    assert run("tokenizer", "--from-hf", "hf", "--out", "tok") == 0
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    flags = ["--seq-len", 16, "--valid-fraction", 0.2, "--workers", 1, "--out", "shards"]
    assert run("build", "--input", corpus, "--tokenizer", "tok", *flags) == 0

    raw = tiny_run("run", "shards", run__init_from="imported") | section
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(raw))
    capsys.readouterr()
    code = cli.run(["check", "my.yaml"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "without its optimizer state" in said.out
    assert cli.run(["evaluate", "imported", "my.yaml"]) == 0
    assert "perplexity" in capsys.readouterr().out
