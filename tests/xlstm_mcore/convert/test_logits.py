"""Logits of an export by transformers, against the equations in fp64."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.xlstm_mcore.convert.small import MODEL, REAL, logits, make_weights, save
from xlstm_mcore.convert import cli

pytestmark = pytest.mark.usefixtures("few_texts")


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
