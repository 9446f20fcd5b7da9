"""A small model with its weights, its tokenizer and its checkpoint, for the tests of conversion."""

import hashlib
import io
import math

import sentencepiece
import torch
from transformers import AutoModelForCausalLM

from pretrain.checkpoint import TensorSlice, save_checkpoint
from xlstm_mcore.convert import cli

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


def refused(capsys, *argv):
    """The one error line of a command that must exit with 2."""
    assert cli.main([str(a) for a in argv]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "Traceback" not in message
    return message


def logits(folder, tokens):
    """Logits of an exported folder by transformers, fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens, use_cache=False).logits
