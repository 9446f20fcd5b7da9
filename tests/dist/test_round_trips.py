"""Round trips: trained on a layout, exported, imported, trained on from there by another layout.

Architectures are drawn from a seed: letters, heads, ties, odd widths and ablations. A failure names
the number that draws it again. All of them on every layout, by command:
`python -m pytest tests/dist/test_round_trips.py --round-trips 16`.
"""

import random

import pytest
import torch

from pretrain.config import ConfigError, config_from_dict
from tests.dist.needs import needs_deepspeed
from tests.dist.test_init_from import STILL, tensors, train
from tests.dist.training_runs import tiny_run
from xlstm_io.checkpoint.manifest import read_manifest, resolve
from xlstm_mcore.convert import cli as convert
from xlstm_mcore.convert.tokenizer import corpus
from xlstm_mcore.inference import model_logits, open_model

pytestmark = [pytest.mark.dist, needs_deepspeed]

LAYOUTS = {
    "tensor 2": {"layout": {"tensor": 2, "sequence": True}},
    "pipeline 2": {"layout": {"pipeline": 2}},
    "replicas 2": {},
    "ZeRO 3": {"engine": {"name": "deepspeed", "zero_stage": 3}},
}
COMMON = {"hidden_size": 48, "num_heads": 2, "vocab_size": 384, "round_up_to": 8}
CHOICES = {
    "hidden_size": (32, 48, 96),
    "num_heads": (2, 4),
    "vocab_size": (332, 384),  # the tokenizer has 330 tokens
    "tie_embeddings": (False, True),
    "norm": ("rmsnorm", "layernorm"),
    "norm_eps": (1e-6, 1e-4),
    "cell_eps": (1e-6, 1e-3),
    "qk_dim_factor": (0.5, 0.75, 1.0),
    "v_dim_factor": (1.0, 1.5),
    "ffn_dim_factor": (2.667, 1.3),
    "gate_soft_cap": (15.0, None),
    "logit_soft_cap": (30.0, None),
    "up_dim_factor": (2.0, 1.5),
    "conv_width": (4, 2, 0),
    "slstm_conv_width": (None, 3, 0),
    "slstm_ffn_dim_factor": (1.3, 2.0),
    "head_norm": ("layernorm", "rmsnorm", "none"),
    "mlstm_gate": ("exp", "sigmoid"),
    "mlstm_input_gate": (True, False),
    "mlstm_forget_gate": (True, False, "bias"),
    "slstm_input_gate": ("exp", "sigmoid"),
    "slstm_forget_gate": ("sigmoid", "exp"),
    "attention_kv_heads": (2, None),
    "attention_window": (None, 5),
    "rotary_base": (10_000.0, 500.0),
    "round_up_to": (8, 64),
}


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    monkeypatch.setattr(corpus, "TEXTS", 50)


def architecture(number):
    """A `model:` section that every layout of `LAYOUTS` can train."""
    rng = random.Random(f"architecture {number}")
    for _ in range(1000):
        letters = "".join(rng.choices("Mmsl*", k=2))
        if number % 4 == 0:
            letters = rng.choice("M*") * 2  # what becomes transformers' own classes
        keys = rng.sample(sorted(CHOICES), 9)
        section = {"pattern": "|".join(letters), **COMMON}
        section |= {key: rng.choice(CHOICES[key]) for key in keys}
        try:
            for name in LAYOUTS:
                config_from_dict(run("somewhere", "data", section, name))
        except ConfigError:
            continue
        return section
    raise AssertionError("no architecture that every layout can train was drawn")


def run(folder, data, section, layout, **changes):
    raw = tiny_run(folder, data, run__steps=1, **{"schedule__warmup_steps": 0} | changes)
    pattern = section["pattern"]
    if layout != "pipeline 2":
        pattern = pattern.replace("|", "")
    return raw | LAYOUTS[layout] | {"model": section | {"pattern": pattern}}


def pytest_generate_tests(metafunc):
    """Each architecture on one layout in CI, on all of them by command."""
    count = metafunc.config.getoption("--round-trips")
    layouts = list(LAYOUTS)
    if "number" in metafunc.fixturenames:
        cases = [
            (number, layouts[(number + shift) % 4], layouts[(number + shift + 1) % 4])
            for number in range(count)
            for shift in range(4 if count >= 16 else 1)
        ]
        metafunc.parametrize(("number", "first", "second"), cases)


def test_weights_and_logits_come_back(pool, shards, tmp_path, number, first, second):
    section = architecture(number)
    assert pool(2, train, run(tmp_path / "first", shards, section, first)) == [0, 0]
    hf, back = str(tmp_path / "hf"), tmp_path / "back"
    assert convert.main(["to-hf", str(tmp_path / "first"), hf]) == 0, section  # it compares both
    words = ["from-hf", hf, str(back), "--vocab-size", str(section["vocab_size"])]
    assert convert.main(words) == 0, section
    before, after = tensors(tmp_path / "first"), tensors(back)
    check_equal(after, before, section)
    tokens = torch.randint(330, (2, 40), generator=torch.Generator().manual_seed(number))
    logits = [
        model_logits(open_model(tmp_path / at), tokens)[..., :330] for at in ("first", "back")
    ]
    assert torch.equal(*logits), section
    # The imported model says its widths in other words, and the layout wants its pipeline cut.
    raw = run(tmp_path / "second", shards, imported(back, section), second, **STILL)
    raw["run"]["init_from"] = str(back)
    assert pool(2, train, raw) == [0, 0], section
    check_equal(tensors(tmp_path / "second"), after, section)


def check_equal(found, wanted, section):
    """Bit by bit over the rows that have a token; the rows behind them are zero or the same."""
    assert found.keys() == wanted.keys(), section
    for name, value in wanted.items():
        real = 330 if len(value) == section["vocab_size"] and "layers" not in name else len(value)
        assert torch.equal(found[name][:real], value[:real]), (name, section)


def imported(back, section):
    model = read_manifest(resolve(back)).config["model"]
    return model | {"pattern": section["pattern"]}
