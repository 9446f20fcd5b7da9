"""The model against its equations in fp64, and the promises of its initialisation."""

import itertools
from typing import get_args

import pytest
import torch

from pretrain.config.schema import ParameterKind
from tests.xlstm_mcore import reference_model
from xlstm_mcore.build import build_model, make_config
from xlstm_mcore.inference import single_process_groups
from xlstm_mcore.parameters.decay import KINDS, decays
from xlstm_mcore.parameters.init import initial_value, initialize
from xlstm_mcore.parameters.slices import named_slices, slices_of_range, stacked_slices
from xlstm_mcore.sizes.parameters import count_parameters


@pytest.fixture(scope="module", autouse=True)
def groups():
    return single_process_groups()


MODELS = {
    "7b": {"pattern": "MM", "norm_eps": 1e-4},
    "7b-tied": {"pattern": "M", "tie_embeddings": True, "qk_dim_factor": 1.0, "norm_eps": 1e-4},
    "7b-uncapped": {"pattern": "M", "gate_soft_cap": None, "logit_soft_cap": None},
    "classic-m": {"pattern": "mm", "norm": "layernorm", "norm_eps": 1e-5, "logit_soft_cap": None},
    "classic-s": {"pattern": "ss", "norm": "layernorm", "norm_eps": 1e-5, "logit_soft_cap": None},
    "mixed": {"pattern": "Mms", "norm": "layernorm", "conv_width": 3, "qkv_block_size": 8},
    "no-conv": {"pattern": "ms", "norm": "layernorm", "norm_eps": 1e-4, "conv_width": 0},
    "sigmoid-gate": {"pattern": "Mm", "norm_eps": 1e-4, "mlstm_gate": "sigmoid"},
    "no-gates": {
        "pattern": "Mm",
        "norm_eps": 1e-4,
        "mlstm_input_gate": False,
        "mlstm_forget_gate": False,
        "head_norm": "rmsnorm",
    },
    "bare": {
        "pattern": "Mms",
        "head_norm": "none",
        "mlstm_gate": "sigmoid",
        "mlstm_input_gate": False,
        "mlstm_normalize": False,
        "slstm_forget_gate": "exp",
    },
    "attention": {"pattern": "**", "attention_heads": 4, "attention_kv_heads": 2},
    "lstm": {"pattern": "ll", "norm": "layernorm", "norm_eps": 1e-4},
    "mamba": {"pattern": "dd", "norm_eps": 1e-4, "ssm_head_dim": 16, "ssm_state_dim": 8},
    "baselines": {
        "pattern": "dlMms",
        "norm_eps": 1e-3,
        "ssm_head_dim": 16,
        "ssm_state_dim": 8,
        "slstm_conv_width": 0,
        "slstm_input_gate": "sigmoid",
        "mlstm_forget_gate": "bias",
    },
    "hybrid": {"pattern": "M*s", "norm_eps": 1e-4, "rotary_base": 100.0},
}


def make(groups, name, **changes):
    section = {"hidden_size": 32, "num_heads": 2, "vocab_size": 40, "round_up_to": 16}
    config = make_config({**section, **MODELS[name], **changes})
    (model,) = build_model(config, groups, seed=1)
    with torch.no_grad():
        rng = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
        for _, parameter, slices in named_slices(model):
            for part in slices:  # away from exp(-m) >> |n q|, where the memory would not show
                if part.name.endswith("igate.bias"):
                    part.local(parameter).clamp_(min=-1.0)
    return config, model


def global_tensors(model, of=lambda p: p.detach()):
    """Global tensors in fp64, put together from the slices of the model's parameters."""
    tensors = {}
    for _, parameter, slices in named_slices(model):
        for part in slices:
            whole = tensors.setdefault(
                part.name, torch.zeros(part.global_shape, dtype=torch.float64)
            )
            part.of_global(whole).copy_(part.local(of(parameter)))
    return tensors


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [1, 2, 19])
def test_losses_and_gradients_equal_the_equations(groups, name, length):
    config, model = make(groups, name)
    rng = torch.Generator().manual_seed(length)
    tokens, labels = torch.randint(0, config.vocab_size, (2, 2, length), generator=rng)
    boundaries = torch.rand(2, length, generator=rng) < 0.2
    weight = torch.rand(2, length, generator=rng)

    got = model(tokens, boundaries, labels)
    (got * weight).sum().backward()
    # of a gate that is held open too: DDP that reduces gradients as they come waits for each
    assert all(parameter.grad is not None for parameter in model.parameters())

    weights = {n: t.requires_grad_() for n, t in global_tensors(model).items()}
    want = reference_model.losses(weights, config, tokens, labels, boundaries)
    (want * weight.double()).sum().backward()

    assert (got - want).abs().max() < 2e-5 * want.abs().max()

    def gradient(p):  # the equations do not read the parameters of a gate that is held open
        return torch.zeros_like(p) if p.grad is None else p.grad

    gradients = global_tensors(model, gradient)
    largest = max(gradient(t).abs().max() for t in weights.values())
    for key, reference in weights.items():
        scale = gradient(reference).abs().max()
        error = (gradients[key] - gradient(reference)).abs().max()
        # what is almost zero, such as k's gradient at a first token, is a difference of large terms
        assert error <= 2e-4 * scale + 1e-6 * largest, f"{key}: {error:.1e} of {scale:.1e}"


@pytest.mark.parametrize(
    "name", ["7b", "classic-m", "classic-s", "mixed", "attention", "no-conv", "bare", "baselines"]
)
def test_generation_state_equals_one_pass(groups, name):
    """Prefill and steps with a cache give the logits of the whole sequence at once."""
    config, model = make(groups, name)
    model.eval()
    tokens = torch.randint(0, config.vocab_size, (2, 23), generator=torch.Generator())
    with torch.no_grad():
        whole = model(tokens)
        cache = {}
        parts = [model(tokens[:, :9], cache=cache), model(tokens[:, 9:11], cache=cache)]
        parts += [model(tokens[:, t : t + 1], cache=cache) for t in range(11, 23)]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_equals_its_documents_apart(groups, name):
    config, model = make(groups, name)
    rng = torch.Generator().manual_seed(4)
    tokens, labels = torch.randint(0, config.vocab_size, (2, 1, 20), generator=rng)
    cuts = [0, 1, 8, 20]
    boundaries = torch.zeros(1, 20, dtype=torch.bool)
    boundaries[0, cuts[:-1]] = True
    with torch.no_grad():
        row = model(tokens, boundaries, labels)
        parts = [model(tokens[:, a:b], None, labels[:, a:b]) for a, b in itertools.pairwise(cuts)]
    assert (row - torch.cat(parts, dim=1)).abs().max() < 2e-5 * row.abs().max()


def test_the_configured_backend_reaches_every_kernel(groups, monkeypatch):
    from xlstm_kernels.common import backends as select

    asked = set()
    original = select._select

    def spy(kernel, backend, *facts):
        asked.add((kernel, backend))
        return original(kernel, backend, *facts)

    monkeypatch.setattr(select, "_select", spy)
    _, model = make(groups, "mixed", kernel_backend="torch")
    model(torch.arange(8)[None])
    kernels = ("mlstm_chunkwise", "slstm_scan", "causal_conv1d", "multihead_norm")
    kernels += ("gated_activation",)
    assert asked == {(k, "torch") for k in kernels}


@pytest.mark.parametrize("name", MODELS)
def test_the_count_of_parameters_is_the_models(groups, name):
    config, model = make(groups, name)
    held = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(config)["total"] == held
    assert sum(t.numel() for t in global_tensors(model).values()) == held


def test_dropout_is_drawn_in_training_only(groups):
    _, model = make(groups, "7b", dropout=0.5)
    tokens = torch.arange(8)[None]
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("name", ["7b", "7b-tied", "classic-m"])
def test_losses_are_the_same_when_the_logits_are_not_held(groups, name):
    results = []
    for limit in (512, 0):
        config, model = make(groups, name)
        config.logits_mib = limit
        tokens, labels = torch.arange(40).view(2, 20), torch.arange(1, 41).view(2, 20) % 40
        losses = model(tokens, None, labels)
        (losses * torch.linspace(0, 1, 40).view(2, 20)).sum().backward()
        results.append({"loss": losses.detach()} | {n: p.grad for n, p in model.named_parameters()})
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-5, atol=1e-6)


def test_mamba2_equals_transformers(groups):
    """The same weights in transformers' `Mamba2Mixer`: outputs and every gradient."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    model_keys = MODELS["mamba"] | {"norm_eps": 1e-5}
    keys = {"hidden_size": 32, "num_heads": 2, "vocab_size": 40, **model_keys}
    (model,) = build_model(make_config(keys), groups, seed=1)
    ours = model.decoder.layers[0].mixer
    there = Mamba2Mixer(
        transformers.Mamba2Config(
            num_heads=4, head_dim=16, hidden_size=32, state_size=8, expand=2, n_groups=1,
            chunk_size=8, use_bias=False, use_conv_bias=True, hidden_act="silu", rms_norm=True,
        ),
        layer_idx=0,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
        pairs = {
            "in_proj.weight": ours.in_proj.weight,
            "conv1d.weight": ours.conv_weight[:, None],
            "conv1d.bias": ours.conv_bias,
            "A_log": ours.a_log,
            "dt_bias": ours.dt_bias,
            "D": ours.skip,
            "norm.weight": ours.norm_weight,
            "out_proj.weight": ours.out_proj.weight,
        }
        assert pairs.keys() == dict(there.named_parameters()).keys()
        for name, parameter in there.named_parameters():
            parameter.copy_(pairs[name])
    x = torch.randn(19, 2, 32, generator=rng)
    weight = torch.randn(19, 2, 32, generator=rng)
    got = ours(x, None)
    want = there(x.transpose(0, 1)).transpose(0, 1)
    assert (got - want).abs().max() < 1e-6 * want.abs().max()
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    grads = {
        "in_proj.weight": ours.in_proj.weight.grad,
        "conv1d.weight": ours.conv_weight.grad[:, None],
        "conv1d.bias": ours.conv_bias.grad,
        "A_log": ours.a_log.grad,
        "dt_bias": ours.dt_bias.grad,
        "D": ours.skip.grad,
        "norm.weight": ours.norm_weight.grad,
        "out_proj.weight": ours.out_proj.weight.grad,
    }
    for name, parameter in there.named_parameters():
        error = (grads[name] - parameter.grad).abs().max()
        assert error < 1e-5 * parameter.grad.abs().max(), name


@pytest.mark.parametrize("exponent", [0.0, 1e-30, 1e-8, 1.0, 90.0, 1e4])
def test_a_decay_survives_its_logit(exponent):
    from xlstm_mcore.mixers.mamba2 import decay_logit

    x = torch.tensor(exponent, requires_grad=True)
    decay = torch.nn.functional.logsigmoid(decay_logit(x))
    decay.backward()
    assert decay.item() == pytest.approx(-exponent, rel=1e-6, abs=1e-19)
    assert torch.isfinite(x.grad)


def test_bf16_model_runs_close_to_fp32(groups):
    section = {"hidden_size": 64, "num_heads": 2, "vocab_size": 40, "pattern": "Mmsld"}
    tokens = torch.arange(12)[None]
    logits = []
    for precision in ("fp32", "bf16"):
        config = make_config(section, precision=precision)
        (model,) = build_model(config, groups, seed=1)
        assert all(p.dtype == config.params_dtype for p in model.parameters())
        logits.append(model(tokens).detach())
    assert logits[1].dtype == torch.float32
    assert (logits[1] - logits[0]).abs().max() < 0.05 * logits[0].abs().max()


class TestInitialisation:
    config = make_config({"pattern": "MmsM", "hidden_size": 64, "num_heads": 4, "vocab_size": 128})

    def value(self, name, shape, seed=0):
        return initial_value(name, shape, self.config, seed)

    def test_spread(self):
        small, wang = (2 / (5 * 64)) ** 0.5, 2 / (4 * 64**0.5)
        for name, std in {
            "embedding.word_embeddings.weight": small,
            "output_layer.weight": small,
            "decoder.layers.0.mixer.q_proj.weight": small,
            "decoder.layers.0.ffn.gate_proj.weight": small,
            "decoder.layers.1.mixer.z_proj.weight": small,
            "decoder.layers.2.mixer.igate.weight": small,
            "decoder.layers.0.mixer.out_proj.weight": wang,
            "decoder.layers.2.ffn.down_proj.weight": wang,
        }.items():
            assert self.value(name, (256, 256)).std().item() == pytest.approx(std, rel=0.02), name

    def test_constants(self):
        for name in (
            "decoder.layers.0.mixer.ogate.weight",
            "decoder.layers.0.mixer.igate.weight",
            "decoder.layers.1.mixer.fgate.weight",
            "decoder.layers.2.mixer.recurrent_weight",
        ):
            assert not self.value(name, (4, 4, 4, 4)).any(), name
        for name in ("decoder.final_norm.weight", "decoder.layers.1.mixer.learnable_skip"):
            assert torch.equal(self.value(name, (9,)), torch.ones(9))
        assert torch.equal(
            self.value("decoder.layers.0.mixer.igate.bias", (4,)), torch.full((4,), -10.0)
        )
        assert torch.equal(
            self.value("decoder.layers.1.mixer.fgate.bias", (4,)),
            torch.tensor([3.0, 4.0, 5.0, 6.0]),
        )
        assert self.value("decoder.layers.1.mixer.igate.bias", (4096,)).std().item() == (
            pytest.approx(0.1, rel=0.05)
        )

    def test_slstm_forget_bias_falls_from_5_to_minus_7(self):
        bias = self.value("decoder.layers.2.mixer.bias", (4, 4, 16))
        assert not bias[[0, 2, 3]].any()
        forget = bias[1, 0]
        assert forget[0] == 5 and forget[-1] == -7 and (forget.diff() < 0).all()
        power = 0.3 + 1.3 * 2 / 3
        assert forget[5].item() == pytest.approx(5 - 12 * (5 / 15) ** power, rel=1e-5)

    def test_of_the_baselines(self):
        """Mamba-2's time steps and decays (arXiv 2405.21060), and the LSTM's forget bias of 1."""
        config = make_config(
            {
                "pattern": "dls",
                "hidden_size": 64,
                "num_heads": 4,
                "vocab_size": 128,
                "slstm_recurrent_init": "normal",
            }
        )

        def value(name, shape):
            return initial_value(f"decoder.layers.{name}", shape, config, 0)

        steps = torch.nn.functional.softplus(value("0.mixer.dt_bias", (4096,)))
        assert 0.001 <= steps.min() < 0.0011 and 0.09 < steps.max() <= 0.1
        decays_ = value("0.mixer.a_log", (4096,)).exp()
        assert 1 <= decays_.min() < 1.1 and 15.9 < decays_.max() <= 16
        assert torch.equal(value("0.mixer.skip", (4,)), torch.ones(4))
        bias = value("1.mixer.bias", (4, 4, 16))
        assert torch.equal(bias[1], torch.ones(4, 16)) and not bias[[0, 2, 3]].any()
        recurrent = value("2.mixer.recurrent_weight", (4, 4, 64, 64))
        assert recurrent.std().item() == pytest.approx(1 / 8, rel=0.02)

    def test_depends_on_seed_and_name_only(self):
        name, shape = "decoder.layers.0.mixer.q_proj.weight", (8, 8)
        assert torch.equal(self.value(name, shape), self.value(name, shape))
        assert not torch.equal(self.value(name, shape), self.value(name, shape, seed=1))
        other = "decoder.layers.0.mixer.k_proj.weight"
        assert not torch.equal(self.value(name, shape), self.value(other, shape))

    def test_every_parameter_has_a_rule(self, groups):
        (model,) = build_model(self.config, groups, seed=0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        initialize(model, self.config, 0)
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_weight_decay_has_the_papers_choice_by_kind(groups):
    _config, model = make(groups, "mixed")
    names = {part.name for _, _, slices in named_slices(model) for part in slices}
    no_decay = {name for name in names if not decays(name)}
    assert {name.rsplit(".", 1)[-1] for name in names - no_decay} == {"weight"}
    assert "output_layer.weight" not in no_decay
    assert "decoder.layers.1.mixer.conv.weight" not in no_decay
    for kind in (
        "embedding.word_embeddings.weight",
        "decoder.layers.1.mixer.learnable_skip",
        "decoder.layers.2.mixer.recurrent_weight",
        "decoder.layers.0.mixer_norm.weight",
        "decoder.layers.0.mixer.head_norm.weight",
        "decoder.layers.2.mixer.bias",
        "decoder.layers.1.mixer.conv.bias",
        "decoder.final_norm.weight",
    ):
        assert kind in no_decay
    for _, _parameter, slices in named_slices(model):  # a parameter is one optimizer entry
        for kind in KINDS:
            for choice in (True, False):
                assert len({decays(part.name, {kind: choice}) for part in slices}) == 1


def test_weight_decay_can_be_chosen_by_kind():
    assert decays("embedding.word_embeddings.weight", {"embedding": True})
    assert not decays("decoder.layers.0.mixer.conv.weight", {"conv": False})
    assert decays("decoder.layers.0.mixer.igate.weight", {"conv": False})
    assert not decays("decoder.layers.0.mixer.igate.weight", {"projection": False})
    with pytest.raises(KeyError, match="no kind for decoder"):
        decays("decoder.layers.0.mixer.surprise")
    assert set(get_args(ParameterKind)) == set(KINDS)


def test_slices_cover_every_parameter_once(groups):
    _, model = make(groups, "mixed")
    for name, parameter, slices in named_slices(model):
        count = torch.zeros(parameter.shape)
        for part in slices:
            part.local(count).add_(1)
        assert (count == 1).all(), name


def test_a_dimension_that_does_not_divide_by_the_ranks_is_refused():
    with pytest.raises(ValueError, match=r"w: dimension 0 of \(6, 2\) does not divide by"):
        stacked_slices(["w"], [(6, 2)], shard_dim=0, rank=0, size=4)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (4, 1, 3), (2, 2, 2, 3)])
def test_slices_of_a_flat_range_cover_it_in_order(shape):
    total = torch.Size(shape).numel()
    values = torch.arange(total).view(shape)
    for start in range(total):
        for end in range(start, total + 1):
            flat = []
            found = slices_of_range(shape, start, end)
            assert len(found) <= 2 * len(shape) - 1
            for offset, size, first in found:
                part = values[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
                assert part.shape == torch.Size(size) and part.flatten()[0] == first
                flat += part.flatten().tolist()
            assert flat == list(range(start, end))
