"""Export to Hugging Face: logits against an fp64 recurrence, the tokenizer, and what is refused."""

import hashlib
import io
import json
import math
import subprocess
import sys

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pretrain.checkpoint import TensorSlice, save_checkpoint
from xlstm_io.tokenizer import open_tokenizer
from xlstm_mcore.convert import cli, to_hf, verify
from xlstm_mcore.convert.errors import ConvertError
from xlstm_mcore.convert.tokenizer import SAMPLES, check_equal, fast_tokenizer

MODEL = {
    "pattern": "M|M",
    "hidden_size": 128,
    "num_heads": 2,
    "vocab_size": 700,
    "tie_embeddings": False,
    "norm": "rmsnorm",
    "norm_eps": 1e-5,
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
    tokens = torch.randint(700, (2, length), generator=torch.Generator().manual_seed(length))
    expected = reference_logits(weights, tokens)
    assert expected.std() > 5, "the logits' cap is not reached"
    torch.testing.assert_close(logits(folder, tokens).double(), expected, rtol=0, atol=2e-3)


def test_every_weight_matters(exported):
    """The comparison above would notice any tensor that went to a wrong place."""
    weights, _, _ = exported
    tokens = torch.arange(17)[None]
    expected = reference_logits(weights, tokens)
    for name, value in weights.items():
        changed = reference_logits(weights | {name: value.flip(0)}, tokens)
        assert (changed - expected).abs().max() > 0.02, name


def test_folder_is_complete_and_native(exported):
    _, checkpoint, folder = exported
    assert {p.name for p in folder.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
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
    runs = [
        model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*runs)
    assert runs[0][0, 0] == 1, "bos comes first"


def test_tied_model_gets_its_own_lm_head(tmp_path, spm):
    weights = make_weights()
    del weights["output_layer.weight"]
    save(tmp_path, weights, spm, tie_embeddings=True)
    assert cli.main(["to-hf", str(tmp_path), str(tmp_path / "hf")]) == 0
    tokens = torch.arange(9)[None]
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], stored["backbone.embeddings.weight"])
    torch.testing.assert_close(
        logits(tmp_path / "hf", tokens).double(),
        reference_logits(weights, tokens),
        rtol=0,
        atol=2e-3,
    )


def test_several_files_of_weights_have_an_index(exported, tmp_path):
    _, checkpoint, folder = exported
    to_hf.export(checkpoint, tmp_path / "hf", max_file_bytes=400_000)
    shards = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    tokens = torch.arange(20)[None]
    assert torch.equal(logits(tmp_path / "hf", tokens), logits(folder, tokens))


def test_odd_widths_turn_the_cache_off(tmp_path, spm, capsys):
    """transformers' cache rounds widths up to 64 and its layers do not: generation would crash."""
    weights = make_weights(qk=48)
    save(tmp_path, weights, spm, qk_dim_factor=0.375)
    assert cli.main(["to-hf", str(tmp_path), str(tmp_path / "hf")]) == 0
    assert "use_cache is off" in capsys.readouterr().err
    tokens = torch.arange(9)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    model.generate(tokens, max_new_tokens=3)
    torch.testing.assert_close(
        model(tokens).logits.double(), reference_logits(weights, tokens), rtol=0, atol=2e-3
    )


def test_fast_tokenizer_equals_sentencepiece(exported, spm):
    training = open_tokenizer(spm)
    exact = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    fast = AutoTokenizer.from_pretrained(exported[2])
    check_equal(fast, training)
    for text, trained in zip(SAMPLES, training.encode(SAMPLES), strict=True):
        ids = fast.encode(text)
        assert ids == [1, *exact.encode(text)]
        # Neither SentencePiece nor the fast form can tell U+2581 from a space; training can.
        same = "\u2581" not in text
        assert (ids == [1, *trained.tolist()]) == same
        assert (fast.decode(ids, skip_special_tokens=True) == text) == same
        assert training.decode(trained) == text


def test_the_export_says_what_its_fast_tokenizer_does_with_the_space_symbol(exported):
    assert "reads the character U+2581 as a space" in (exported[2] / "README.md").read_text()


def test_another_tokenizer_is_noticed_by_its_ids(spm, tmp_path):
    other = train_tokenizer(tmp_path / "other.model", vocab_size=400)
    with pytest.raises(ConvertError, match="other ids than SentencePiece"):
        check_equal(fast_tokenizer(open_tokenizer(spm)), open_tokenizer(other))


def test_user_defined_symbols_keep_their_ids(tmp_path):
    symbols = ["<|sep|>", "\n", "\n\n", "  ", "\u2581\u2581\u2581", "x\u2581"]
    path = train_tokenizer(tmp_path / "u.model", user_defined_symbols=symbols)
    fast = fast_tokenizer(open_tokenizer(path))  # checked inside, on texts made of its pieces
    exact = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in ("a<|sep|>b", "\n\n\n", "      ", "x y  x  z", "<|sep|><s>"):
        assert fast.encode(text) == [1, *exact.encode(text)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "unigram"}, "not BPE"),
        ({"add_dummy_prefix": True}, "dummy prefix"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalisation rule"),
    ],
)
def test_a_tokenizer_without_exact_fast_form(changes, words, tmp_path, capsys):
    spm = train_tokenizer(tmp_path / "t.model", **changes)
    save(tmp_path, make_weights(), spm)
    assert cli.main(["to-hf", str(tmp_path), str(tmp_path / "hf")]) == 0
    assert words in capsys.readouterr().err
    assert (tmp_path / "hf" / "tokenizer.model").exists()
    assert not (tmp_path / "hf" / "tokenizer.json").exists()


def refused(capsys, *argv):
    """The one error line of a command that must exit with 2."""
    assert cli.main([str(a) for a in argv]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "Traceback" not in message
    return message


def test_what_cannot_be_exported_is_refused_with_the_reason(exported, tmp_path, spm, capsys):
    weights, checkpoint, _ = exported
    classic = save(tmp_path / "classic", {"w": torch.ones(4)}, spm, pattern="mms|m")
    out = tmp_path / "out"
    assert "the export of classic blocks (m, s) is not built yet" in refused(
        capsys, "to-hf", classic, out
    )
    for changes, words in (
        ({"gate_soft_cap": None}, "model.gate_soft_cap=None"),
        ({"mlstm_gate": "sigmoid"}, "model.mlstm_gate=sigmoid: transformers' xlstm always has exp"),
        ({"norm": "layernorm"}, "model.norm=layernorm"),
        ({"hidden_size": 64}, "[700, 128], its config makes [700, 64]"),
        ({"pattern": "M"}, "no place for: ['decoder.layers.1."),
        ({"pattern": "MMM"}, "does not hold the tensor decoder.layers.2."),
    ):
        other = save(tmp_path / "other", weights, spm, **changes)
        assert words in refused(capsys, "to-hf", other, out)
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
    assert cli.main(["to-hf", str(checkpoint), str(out)]) == 0
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


def test_verify_accepts_an_export_and_refuses_other_weights(exported, monkeypatch, capsys):
    weights, checkpoint, folder = exported
    monkeypatch.setattr(verify, "own_logits", lambda _: lambda t: reference_logits(weights, t))
    assert cli.main(["verify", str(checkpoint), str(folder)]) == 0
    report = json.loads((folder / "parity.json").read_text())
    assert report["passed"] and [r["length"] for r in report["lengths"]] == [1, 15, 64, 100]
    assert "generated by transformers" in capsys.readouterr().out
    name = "decoder.layers.1.mixer.igate.bias"
    wrong = weights | {name: weights[name] + 0.5}
    monkeypatch.setattr(verify, "own_logits", lambda _: lambda t: reference_logits(wrong, t))
    assert cli.main(["verify", str(checkpoint), str(folder)]) == 1
    assert not json.loads((folder / "parity.json").read_text())["passed"]
    assert not verify.passed([verify.Parity(1, math.nan, 1.0)])
    (folder / "parity.json").unlink()


def test_help_needs_no_transformers():
    code = (
        "import sys; from xlstm_mcore.convert import cli\n"
        "try: cli.main(['to-hf', '--help'])\n"
        "except SystemExit as done: print(done.code, 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "0 False" and "--tokenizer" in out.stdout
