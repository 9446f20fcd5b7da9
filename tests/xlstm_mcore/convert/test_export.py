"""Export to Hugging Face: what is in the folder, its formats, and what is an error."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from tests.xlstm_mcore.convert.small import REAL, logits, refused, save, train_tokenizer
from xlstm_mcore.convert import cli
from xlstm_mcore.convert.export import to_hf

pytestmark = pytest.mark.usefixtures("few_texts")


def test_folder_is_complete_and_native(exported):
    _, checkpoint, folder = exported
    assert {p.name for p in folder.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "parity.json",
        "parity.md",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "xlstm_export.json",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["chunkwise_kernel"] == "chunkwise--native_autograd"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 3)
    assert config["architectures"] == ["xLSTMForCausalLM"] and not config["tie_word_embeddings"]
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 2
    card = (folder / "README.md").read_text()
    assert card.count("```") == 2 and "```python\n" in card
    assert checkpoint.name in card and "11 steps on 4,321 tokens" in card
    everything = "".join(p.read_text() for p in folder.glob("*.*") if p.suffix in (".json", ".md"))
    assert str(checkpoint.parent.parent) not in everything, "a machine's path was published"
    assert not list(folder.parent.glob(".*")), "temporary folders are left"


def test_rows_of_padding_are_kept_when_asked(exported, tmp_path):
    _, checkpoint, folder = exported
    to_hf.export(checkpoint, tmp_path / "hf", keep_padding=True)
    kept, cut = (load_file(f / "model.safetensors") for f in (tmp_path / "hf", folder))
    for name, tensor in kept.items():
        padded = name in ("lm_head.weight", "backbone.embeddings.weight")
        assert len(tensor) == (700 if padded else len(cut[name]))
        assert torch.equal(tensor[: len(cut[name])], cut[name])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["vocab_size"] == 700
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == REAL


def test_rows_that_training_left_out_are_kept_by_our_own_class_alone(
    exported, spm, tmp_path, capsys
):
    checkpoint = save(tmp_path, exported[0], spm, vocab_tokens=REAL)
    assert to_hf.export(checkpoint, tmp_path / "a", dry_run=True).family == "xlstm"
    kept = to_hf.export(checkpoint, tmp_path / "a", dry_run=True, keep_padding=True)
    assert kept.family == "xlstm_blocks" and kept.padding == 0
    words = ["to-hf", checkpoint, tmp_path / "a", "--keep-padding", "--family", "xlstm"]
    assert f"training gave one to the first {REAL} alone (leave --keep-padding out), so this" in (
        refused(capsys, *words)
    )


def test_several_files_of_weights_have_an_index(exported, tmp_path):
    _, checkpoint, folder = exported
    to_hf.export(checkpoint, tmp_path / "hf", shard_bytes=400_000)
    shards = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    tokens = torch.arange(20)[None]
    assert torch.equal(logits(tmp_path / "hf", tokens), logits(folder, tokens))
    assert cli.main(["verify", str(checkpoint), str(tmp_path / "hf")]) == 0


@pytest.mark.parametrize(("dtype", "type_"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_rounded_to_the_type_that_is_asked_for(exported, tmp_path, dtype, type_):
    weights, checkpoint, _ = exported
    assert cli.main(["to-hf", str(checkpoint), str(tmp_path / "hf"), "--dtype", dtype]) == 0
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {type_}
    wanted = weights["output_layer.weight"][:REAL].to(type_)
    assert torch.equal(stored["lm_head.weight"], wanted)


def test_numbers_too_large_for_fp16_are_an_error(exported, tmp_path, spm, capsys):
    weights = exported[0] | {"decoder.final_norm.weight": torch.full((128,), 1e5)}
    save(tmp_path, weights, spm)
    message = refused(capsys, "to-hf", tmp_path, tmp_path / "hf", "--dtype", "fp16")
    assert "decoder.final_norm.weight has numbers too large for fp16" in message
    assert not list(tmp_path.glob("*hf*")) and not list(tmp_path.glob(".*"))


def test_a_dry_run_prints_the_table_and_writes_nothing(exported, tmp_path, capsys):
    _, checkpoint, _ = exported
    words = ["to-hf", str(checkpoint), str(tmp_path / "hf"), "--dry-run"]
    assert cli.main(words) == 0
    assert "decoder.layers.1.mixer.q_proj.weight -> backbone.blocks.1.mlstm_layer.q.weight" in (
        capsys.readouterr().out
    )
    assert cli.main([*words, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["family"] == "xlstm" and len(table["tensors"]) == 33
    assert not (tmp_path / "hf").exists()


def test_what_cannot_be_exported_is_refused_with_the_reason(exported, tmp_path, spm, capsys):
    weights, checkpoint, _ = exported
    out = tmp_path / "out"
    for changes, words in (
        ({"hidden_size": "wide"}, "model.hidden_size=wide must be a whole number"),
        ({"norm_eps": -1.0}, "model.norm_eps=-1.0 must be greater than 0"),
        ({"hidden_size": 64}, "[700, 128], its config makes [700, 64]"),
        ({"pattern": "M"}, "no place for: ['decoder.layers.1."),
        ({"pattern": "MMM"}, "does not hold the tensor decoder.layers.2."),
    ):
        other = save(tmp_path / "other", weights, spm, **changes)
        assert words in refused(capsys, "to-hf", other, out)
    uncapped = save(tmp_path / "uncapped", weights, spm, gate_soft_cap=None)
    message = refused(capsys, "to-hf", uncapped, out, "--family", "xlstm")
    assert "transformers' xlstm always has a model.gate_soft_cap" in message
    assert "no such folder" in refused(capsys, "to-hf", tmp_path / "nothing", out)
    assert "no such file" in refused(capsys, "to-hf", checkpoint, out, "--tokenizer", "no.model")
    another = train_tokenizer(tmp_path / "another.model", vocab_size=400)
    message = refused(capsys, "to-hf", checkpoint, out, "--tokenizer", another)
    assert "is not the tokenizer of this checkpoint" in message
    assert "no config.json" in refused(capsys, "verify", checkpoint, tmp_path)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_help_needs_no_transformers():
    code = (
        "import sys; from xlstm_mcore.convert import cli\n"
        "try: cli.main(['to-hf', '--help'])\n"
        "except SystemExit as done: print(done.code, 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "0 False" and "--tokenizer" in out.stdout
