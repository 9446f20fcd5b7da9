"""Export to Hugging Face: logits against an fp64 recurrence, formats, and what is an error."""

import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pretrain import layout as layouts
from pretrain.checkpoint import TensorSlice, save_checkpoint
from tests import fake_object_store
from xlstm_mcore.convert import cli
from xlstm_mcore.convert.export import to_hf
from xlstm_mcore.convert.export import weights as weights_module
from xlstm_mcore.convert.export.folder import building
from xlstm_mcore.convert.proof import verify
from xlstm_mcore.convert.tokenizer import corpus as tokenizer_corpus

MODEL = {
    "pattern": "M|M",
    "hidden_size": 128,
    "num_heads": 2,
    "vocab_size": 700,
    "tie_embeddings": False,
    "norm": "rmsnorm",
    "norm_eps": 1e-4,
    "cell_eps": 1e-6,
    "qk_dim_factor": 0.5,
    "v_dim_factor": 1.0,
    "ffn_dim_factor": 2.667,
    "gate_soft_cap": 15.0,
    "logit_soft_cap": 30.0,
    "round_up_to": 64,
}
TRAINING = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "byte_fallback": True,
    "pad_id": 3,
    "vocab_size": 450,
}


#: Tokens of the tokenizer; the rows of the vocabulary behind them are padding.
REAL = 450


@pytest.fixture(scope="module", autouse=True)
def few_texts_and_no_groups_left():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_corpus, "TEXTS", 200)
        yield
    layouts.leave()


def make_weights(seed=0, qk=64):
    """Random weights under global names: all gates, caps and norms have an effect."""
    g = torch.Generator().manual_seed(seed)
    d, heads, v, f, vocab = 128, 2, 128, 384, 700

    def matrix(rows, columns, gain=1.0):
        return torch.randn(rows, columns, generator=g) * gain / math.sqrt(columns)

    def norm(width):
        return 1 + 0.3 * torch.randn(width, generator=g)

    w = {"embedding.word_embeddings.weight": torch.randn(vocab, d, generator=g)}
    for n in range(2):
        p = f"decoder.layers.{n}."
        w[p + "mixer_norm.weight"] = norm(d)
        w[p + "mixer.q_proj.weight"] = matrix(qk, d)
        w[p + "mixer.k_proj.weight"] = matrix(qk, d)
        w[p + "mixer.v_proj.weight"] = matrix(v, d)
        w[p + "mixer.ogate.weight"] = matrix(v, d)
        for gate, bias in (("igate", torch.tensor([-3.0, 1.0])), ("fgate", torch.tensor([3.0, 6]))):
            w[p + f"mixer.{gate}.weight"] = matrix(heads, d, gain=8.0)
            w[p + f"mixer.{gate}.bias"] = bias
        w[p + "mixer.head_norm.weight"] = norm(v)
        w[p + "mixer.out_proj.weight"] = matrix(d, v)
        w[p + "ffn_norm.weight"] = norm(d)
        w[p + "ffn.gate_proj.weight"] = matrix(f, d, 2.0)
        w[p + "ffn.up_proj.weight"] = matrix(f, d)
        w[p + "ffn.down_proj.weight"] = matrix(d, f)
    w["decoder.final_norm.weight"] = norm(d)
    w["output_layer.weight"] = matrix(vocab, d, gain=12.0)
    return w


def reference_logits(weights, tokens):
    """The model from its equations (arXiv 2503.13427), token by token, fp64. tokens [b, s]."""
    w = {name: value.double() for name, value in weights.items()}
    heads, eps = 2, MODEL["norm_eps"]

    def rms(x, weight):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight

    def cap(x, limit):
        return limit * torch.tanh(x / limit)

    def cell(x, p):
        q, k, v = (
            (x @ w[p + f"{name}_proj.weight"].T).unflatten(-1, (heads, -1)) for name in "qkv"
        )
        i, f = (
            cap(x @ w[p + f"{gate}gate.weight"].T + w[p + f"{gate}gate.bias"], 15.0)
            for gate in "if"
        )
        batch, length, _, dqk = q.shape
        c = torch.zeros(batch, heads, dqk, v.shape[-1], dtype=torch.float64)
        n = torch.zeros(batch, heads, dqk, dtype=torch.float64)
        m = torch.zeros(batch, heads, dtype=torch.float64)
        out = []
        for t in range(length):
            log_f = -torch.log1p(torch.exp(-f[:, t]))
            m_new = torch.maximum(log_f + m, i[:, t])
            keep, add = torch.exp(log_f + m - m_new), torch.exp(i[:, t] - m_new)
            m = m_new
            c = keep[..., None, None] * c + add[..., None, None] * (
                k[:, t, :, :, None] * v[:, t, :, None, :]
            )
            n = keep[..., None] * n + add[..., None] * k[:, t]
            qt = q[:, t] / math.sqrt(dqk)
            numerator = (qt[..., None] * c).sum(-2)
            denominator = torch.maximum((qt * n).sum(-1).abs(), torch.exp(-m)) + 1e-6
            h = numerator / denominator[..., None]
            h = h - h.mean(-1, keepdim=True)
            out.append((h / torch.sqrt((h * h).mean(-1, keepdim=True) + eps)).flatten(1))
        return torch.stack(out, 1)

    x = w["embedding.word_embeddings.weight"][tokens]
    for n in range(2):
        p = f"decoder.layers.{n}."
        u = rms(x, w[p + "mixer_norm.weight"])
        h = cell(u, p + "mixer.") * w[p + "mixer.head_norm.weight"]
        x = x + (torch.sigmoid(u @ w[p + "mixer.ogate.weight"].T) * h) @ (
            w[p + "mixer.out_proj.weight"].T
        )
        u = rms(x, w[p + "ffn_norm.weight"])
        gate = u @ w[p + "ffn.gate_proj.weight"].T
        up = u @ w[p + "ffn.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[p + "ffn.down_proj.weight"].T
    output = w.get("output_layer.weight", w["embedding.word_embeddings.weight"])
    return cap(rms(x, w["decoder.final_norm.weight"]) @ output.T, 30.0)


def train_tokenizer(path, **changes):
    text = ["the quick brown fox  jumps over\tthe lazy dog", "def f(x):\n    return x + 1"] * 50
    text += [chr(33 + i) + chr(90 - i) + f" word{i}" for i in range(50)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
        **(TRAINING | changes),
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def save(root, weights, spm, **changes):
    """A checkpoint with optimizer state, cut into two slices per matrix."""
    chunks = []
    for name, value in weights.items():
        half = value.shape[0] // 2
        rest = (0,) * (value.ndim - 1)
        chunks += [
            TensorSlice(name, tuple(value.shape), (0, *rest), value[:half]),
            TensorSlice(name, tuple(value.shape), (half, *rest), value[half:]),
            TensorSlice(
                f"optimizer.state.param.{name}",
                tuple(value.shape),
                (0, *rest),
                torch.full_like(value, math.nan),
            ),
        ]
    digest = hashlib.sha256(spm.read_bytes()).hexdigest()
    state = {"tokens": 4321, "tokenizer": {"path": str(spm), "sha256": digest}}
    return save_checkpoint(root, chunks, state, {"model": MODEL | changes}, step=11)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, spm):
    """(weights, checkpoint, folder)."""
    root = tmp_path_factory.mktemp("run")
    weights = make_weights()
    checkpoint = save(root, weights, spm)
    assert cli.main(["to-hf", str(root), str(root / "hf")]) == 0
    return weights, checkpoint, root / "hf"


def logits(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("length", [1, 5, 17, 64, 70])
def test_logits_equal_the_step_recurrence(exported, length):
    weights, _, folder = exported
    tokens = torch.randint(REAL, (2, length), generator=torch.Generator().manual_seed(length))
    expected = reference_logits(weights, tokens)[..., :REAL]
    assert expected.std() > 5, "the logits' cap is not reached"
    torch.testing.assert_close(logits(folder, tokens).double(), expected, rtol=0, atol=2e-3)


def test_every_weight_matters(exported):
    """The comparison above would notice any tensor that went to a wrong place."""
    weights, _, _ = exported
    tokens = torch.arange(17)[None]
    expected = reference_logits(weights, tokens)
    for name, value in weights.items():
        changed = reference_logits(weights | {name: value.roll(1, 0)}, tokens)
        assert (changed - expected).abs().max() > 0.02, name


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


def test_generate_with_and_without_cache(exported):
    _, _, folder = exported
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("the quick", return_tensors="pt", return_token_type_ids=False)
    options = {"max_new_tokens": 8, "do_sample": False}
    runs = [model.generate(**inputs, use_cache=use_cache, **options) for use_cache in (True, False)]
    assert torch.equal(*runs)
    assert runs[0][0, 0] == 1, "bos comes first"


def test_a_tied_model_stays_tied(tmp_path, spm, capsys):
    weights = make_weights()
    del weights["output_layer.weight"]
    save(tmp_path, weights, spm, tie_embeddings=True)
    assert cli.main(["to-hf", str(tmp_path), str(tmp_path / "hf")]) == 0
    count = sum(t.numel() for t in weights.values())
    without_padding = count - (700 - REAL) * 128
    assert f"{without_padding:,} parameters, {count:,} with rows of padding" in (
        capsys.readouterr().out
    )
    assert f"{without_padding:,} parameters" in (tmp_path / "hf" / "README.md").read_text()
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert "lm_head.weight" not in stored
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert model.num_parameters() == without_padding
    assert model.lm_head.weight is model.model.embeddings.weight
    tokens = torch.arange(9)[None]
    expected = reference_logits(weights, tokens)[..., :REAL]
    torch.testing.assert_close(model(tokens).logits.double(), expected, rtol=0, atol=2e-3)


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


@pytest.mark.parametrize("finished", [0, 1, 4])
def test_a_killed_conversion_goes_on(exported, tmp_path, monkeypatch, finished):
    """Finished files are kept, a cut one and a damaged one are written again."""
    _, checkpoint, _ = exported
    whole = to_hf.export(checkpoint, tmp_path / "whole", shard_bytes=400_000)
    write, written = weights_module.write_safetensors, []

    def dies(path, *arguments):
        result = write(path, *arguments)
        if len(written) == finished:
            os.truncate(path, 1000)
            raise KeyboardInterrupt
        written.append(path)
        return result

    monkeypatch.setattr(weights_module, "write_safetensors", dies)
    with pytest.raises(KeyboardInterrupt):
        to_hf.export(checkpoint, tmp_path / "hf", shard_bytes=400_000)
    assert not (tmp_path / "hf").exists()
    kept = len(written)
    if finished == 4:
        written[2].write_bytes(written[2].read_bytes()[:-1] + b"x")
        kept -= 1
    written.clear()
    finished = -1
    to_hf.export(checkpoint, tmp_path / "hf", shard_bytes=400_000)
    assert len(written) == len(whole.plan.files) - kept
    folders = (tmp_path / "whole", tmp_path / "hf")
    first, second = ({p.name: p.read_bytes() for p in f.iterdir()} for f in folders)
    assert first == second
    assert not list(tmp_path.glob(".*"))


def test_another_conversion_of_the_same_folder_is_an_error(exported, tmp_path, capsys):
    _, checkpoint, _ = exported
    with building(tmp_path / "hf"):
        message = refused(capsys, "to-hf", checkpoint, tmp_path / "hf")
        assert "another conversion is writing" in message


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


def test_an_export_to_a_url_is_the_same_folder(exported, tmp_path):
    _, checkpoint, folder = exported
    fake_object_store.register()
    url = f"objects://{tmp_path}/bucket/hf"
    for _ in range(2):  # the second replaces the first
        assert cli.main(["to-hf", str(checkpoint), url]) == 0
    found = {p.name: p.read_bytes() for p in (tmp_path / "bucket/hf").iterdir()}
    local = {p.name: p.read_bytes() for p in folder.iterdir() if "parity" not in p.name}
    assert found == local


def refused(capsys, *argv):
    """The one error line of a command that must exit with 2."""
    assert cli.main([str(a) for a in argv]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "Traceback" not in message
    return message


def test_what_cannot_be_exported_is_refused_with_the_reason(exported, tmp_path, spm, capsys):
    weights, checkpoint, _ = exported
    out = tmp_path / "out"
    for changes, words in (
        ({"hidden_size": "wide"}, "model.hidden_size must be a whole number"),
        ({"norm_eps": -1.0}, "model.norm_eps must be greater than 0"),
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


def test_only_an_earlier_export_is_replaced(exported, tmp_path, capsys):
    _, checkpoint, _ = exported
    out = tmp_path / "hf"
    out.mkdir()
    assert cli.main(["to-hf", str(checkpoint), str(out)]) == 0
    (out / "parity.json").write_text("{}")
    assert cli.main(["to-hf", str(checkpoint), str(out), "--no-verify"]) == 0
    assert not (out / "parity.json").exists(), "a report about older weights is not kept"
    capsys.readouterr()
    (out / "xlstm_export.json").unlink()
    before = sorted(out.iterdir())
    assert "is not an earlier export" in refused(capsys, "to-hf", checkpoint, out)
    assert sorted(out.iterdir()) == before
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is not an earlier export" in refused(capsys, "to-hf", checkpoint, file)
    assert file.read_text() == "mine"


def test_verify_accepts_an_export_and_refuses_other_weights(exported, tmp_path, capsys):
    _, checkpoint, folder = exported
    assert cli.main(["verify", str(checkpoint), str(folder)]) == 0
    assert "generated by transformers" in capsys.readouterr().out
    report = json.loads((folder / "parity.json").read_text())
    assert report["passed"]
    results = {check["name"]: check["passed"] for check in report["checks"]}
    assert results.pop("padding") is None, "the class ignores the mask, so nothing is compared"
    assert len(results) == 9 and all(results.values())
    other = shutil.copytree(folder, tmp_path / "other")
    stored = load_file(other / "model.safetensors")
    stored["backbone.blocks.1.mlstm_layer.igate_preact.bias"] += 0.5
    save_file(stored, other / "model.safetensors")
    assert cli.main(["verify", str(checkpoint), str(other)]) == 3
    report = json.loads((other / "parity.json").read_text())
    assert not report["passed"]
    wrong = [check["name"] for check in report["checks"] if check["passed"] is False]
    assert wrong == ["tensors", *(f"logits of {b} x {n} tokens" for b, n in verify.BATCHES)]


def test_verify_notices_what_is_missing_or_changed(exported, tmp_path, capsys):
    _, checkpoint, folder = exported
    for number, (name, text, wrong) in enumerate(
        (
            ("modeling.py", "print('mine')", "code: DIFFERENT"),
            ("generation_config.json", '{"eos_token_id": 7}', "generation config: DIFFERENT"),
            ("tokenizer.json", None, "tokenizer: DIFFERENT"),
        )
    ):
        other = shutil.copytree(folder, tmp_path / str(number))
        if text is None:
            body = json.loads((other / name).read_text())
            body["model"]["byte_fallback"] = False
            text = json.dumps(body)
        (other / name).write_text(text)
        assert cli.main(["verify", str(checkpoint), str(other)]) == 3
        assert wrong in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"xlstm_export.json": "{}"}, "is missing or damaged"),
        ({"xlstm_export.json": '{"family": "bert", "dtype": "fp32"}'}, "is missing or damaged"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "../x"}}'}, "outside its folder"),
        ({"model.safetensors.index.json": '{"weight_map": 7}'}, "is damaged"),
    ],
)
def test_a_damaged_export_is_one_message(exported, tmp_path, capsys, damage, words):
    _, checkpoint, folder = exported
    other = shutil.copytree(folder, tmp_path / "other")
    for name, text in damage.items():
        (other / name).write_text(text)
    assert words in refused(capsys, "verify", checkpoint, other)


def test_help_needs_no_transformers():
    code = (
        "import sys; from xlstm_mcore.convert import cli\n"
        "try: cli.main(['to-hf', '--help'])\n"
        "except SystemExit as done: print(done.code, 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "0 False" and "--tokenizer" in out.stdout
