"""The model against its equations in fp64."""

import itertools

import pytest
import torch

from tests.xlstm_mcore import reference_model
from xlstm_mcore import layer
from xlstm_mcore.build import build_model, make_config
from xlstm_mcore.inference import single_process_groups
from xlstm_mcore.parameters.slices import named_slices
from xlstm_mcore.sizes.parameters import count_parameters


@pytest.fixture(scope="module", autouse=True)
def groups():
    return single_process_groups()


MODELS = {
    "7b": {"pattern": "MM", "norm_eps": 1e-4},
    "7b-tied": {
        "pattern": "M",
        "tie_embeddings": True,
        "qk_dim_factor": 1.0,
        "norm_eps": 1e-4,
        "cell_eps": 0.3,
    },
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
    "plain-lstm": {
        "pattern": "lls",
        "norm": "layernorm",
        "norm_eps": 1e-4,
        "num_heads": 1,
        "slstm_conv_width": 0,
        "slstm_ffn_dim_factor": 0.0,
        "residual": False,
    },
    "resnet": {"pattern": "ls", "norm_eps": 1e-4, "slstm_ffn_dim_factor": 0.0},
    "hybrid": {"pattern": "M*s", "norm_eps": 1e-4, "rotary_base": 100.0},
    "window": {
        "pattern": "*M*",
        "norm_eps": 1e-4,
        "attention_heads": 4,
        "attention_kv_heads": 2,
        "attention_window": 3,
        "attention_sinks": 2,
    },
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
    "name",
    [
        *("7b", "classic-m", "classic-s", "mixed", "attention", "window", "no-conv", "bare"),
        "baselines",
    ],
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
    kernels += ("gated_activation", "gated_skip", "qkv_and_gates")
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


@pytest.mark.parametrize("letter", "Mmsld*")
def test_dropout_is_of_all_that_a_block_adds(groups, letter, monkeypatch):
    changes = {"pattern": letter, "ssm_head_dim": 16, "ssm_state_dim": 8, "dropout": 0.5}
    _, model = make(groups, "7b", **changes)
    monkeypatch.setattr(layer.F, "dropout", lambda x, share: torch.zeros_like(x))
    x = torch.randn(6, 32)
    with torch.no_grad():
        assert torch.equal(model.decoder.layers[0].train()(x, 2, None), x)


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
    got = ours(x.flatten(0, 1), 2, None).view(x.shape)
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
