"""Activation recompute: gradients to the bit, and bytes kept against a formula."""

import gc
import weakref

import pytest
import torch
from megatron.core import tensor_parallel
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks.counting.saved_memory import count_saved
from xlstm_kernels import gated_activation, multihead_norm, norm_gated_skip
from xlstm_mcore.build import build_model, make_config
from xlstm_mcore.inference import single_process_groups
from xlstm_mcore.layer import XLSTMLayer, layer_spec
from xlstm_mcore.megatron import compat
from xlstm_mcore.mixers import mlstm, mlstm_classic
from xlstm_mcore.modules import feed_forward, norm
from xlstm_mcore.modules.products import product_of
from xlstm_mcore.recompute import recompute_in_backward, rerun_cell, run_again, selective

SECTION = {
    "pattern": "Mms*",
    "hidden_size": 32,
    "num_heads": 2,
    "vocab_size": 40,
    "round_up_to": 16,
    "dropout": 0.3,
}


@pytest.fixture(scope="module", autouse=True)
def groups():
    return single_process_groups()


def make(groups, precision="fp32", **settings):
    config = make_config(SECTION, precision=precision, memory=settings)
    (model,) = build_model(config, groups, seed=1)
    with torch.no_grad():
        rng = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    return model.train()


def gradients(model):
    """Loss and gradients of a packed batch, with both random states where they always start."""
    rng = torch.Generator().manual_seed(2)
    tokens, labels = torch.randint(0, 40, (2, 2, 21), generator=rng)
    boundaries = torch.rand(2, 21, generator=rng) < 0.2
    torch.manual_seed(5)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.reset()
    compat.seed_parallel(6)
    model.zero_grad()
    losses = model(tokens, boundaries, labels)
    losses.sum().backward()
    return losses.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [
        {"recompute": "selective"},
        {"recompute": "cells"},
        {"recompute": "full"},
        {"recompute_full_blocks": "s"},
        {"recompute": "selective", "recompute_full_blocks": "M*"},
    ],
    ids=lambda s: "-".join(s.values()),
)
def test_gradients_are_the_same_bits(groups, settings, precision):
    """With dropout and boundaries: random numbers are replayed, not drawn anew."""
    losses, expected = gradients(make(groups, precision))
    again, got = gradients(make(groups, precision, **settings))
    assert torch.equal(losses, again)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def kept(groups, letter, tokens, precision="bf16", **settings):
    """Bytes that one layer keeps for its backward pass."""
    section = {**SECTION, "pattern": letter, "dropout": 0.0}
    config = make_config(section, precision=precision, memory=settings)
    layer = XLSTMLayer(config, layer_spec(letter, config).submodules, groups, layer_number=0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(tokens, 32, dtype=config.params_dtype, requires_grad=True)
    with count_saved(layer.parameters()) as saved:
        layer(x, 1, None)
    return saved.bytes, config


@pytest.mark.parametrize("letter", ["M", "m", "s", "*"])
def test_a_block_recomputed_in_full_keeps_its_input(groups, letter):
    size, config = kept(groups, letter, 64, recompute="full")
    assert size == 64 * config.hidden_size * 2


@pytest.mark.parametrize("mode", ["selective", "cells"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_large_block_keeps_what_the_formula_says(groups, precision, mode):
    """Per token of an `M` block: its cell keeps neither its states nor its output."""
    size = 2 if precision == "bf16" else 4
    few, config = kept(groups, "M", 64, precision, recompute=mode)
    many, _ = kept(groups, "M", 128, precision, recompute=mode)
    d, qk, v, f = config.hidden_size, config.qk_dim, config.v_dim, config.ffn_dim
    # the residual stream twice; q, k, v and o; gate and up of the feed-forward part
    wide = 2 * d + (2 * qk + 2 * v) + 2 * f
    gates = 2 * config.num_heads  # in fp32; the soft cap is the cell's
    assert (many - few) / 64 == wide * size + gates * 4


def test_a_classic_block_keeps_its_cell_but_with_cells(groups):
    """The cell is a large part of the block."""
    selective_size, config = kept(groups, "m", 64, recompute="selective")
    cells_size, _ = kept(groups, "m", 64, recompute="cells")
    assert selective_size > cells_size + 64 * config.up_dim * 2  # the output, and states


def test_a_cell_runs_once_more_for_all_that_need_it(groups):
    runs = []

    def double(x):
        runs.append(1)
        return x * x

    x = torch.randn(3, requires_grad=True)
    with count_saved([]) as saved, selective(cells=True):
        y = rerun_cell(double, x)
        z = (y * y).sum() + y.exp().sum()
    assert saved.bytes == 2 * x.numel() * 4  # the input, and the exponential
    z.backward()
    assert torch.allclose(x.grad, 4 * x**3 + 2 * x * (x * x).exp())
    assert len(runs) == 2


def test_a_cell_frees_its_inputs_though_the_graph_is_held(groups):
    """A schedule holds the loss of a micro-batch while the next one runs."""
    x = torch.randn(3, requires_grad=True)
    with selective(cells=True):
        y = x + 1
        z = rerun_cell(torch.square, y).exp().sum()
    held = StorageWeakRef(y.untyped_storage())
    del y
    assert not held.expired()
    z.backward()
    assert held.expired()


@pytest.mark.parametrize("letter", ["M", "m", "s", "*"])
def test_selective_keeps_less_than_none_and_more_than_full(groups, letter):
    sizes = [kept(groups, letter, 64, recompute=mode)[0] for mode in ("none", "selective", "full")]
    # The norm keeps its input alone in every mode, which an `s` block has two of.
    assert sizes[0] > 1.2 * sizes[1] and sizes[1] > 1.3 * sizes[2]


def test_a_recipe_gives_every_user_the_tensor_and_runs_once(groups):
    runs = []

    def double(x):
        runs.append(1)
        return x * 2

    x = torch.randn(3, requires_grad=True)
    with selective():
        y = recompute_in_backward(double, x)
        z = (y * y).sum() + y[1:].square().sum()
    assert len(runs) == 1
    z.backward()
    assert torch.equal(x.grad, 8 * x + torch.cat((torch.zeros(1), 8 * x[1:])))
    assert len(runs) == 3  # the recipe, once for all of its users, and the function's own gradient


class Doubled(torch.autograd.Function):
    """A kernel that keeps its input alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        assert ctx.saved_tensors[0].shape == grad.shape
        return grad * 2


def test_a_kernel_that_keeps_its_inputs_does_not_run_again_for_its_own_gradient(groups):
    runs = []

    def double(x):
        runs.append(1)
        return Doubled.apply(x)

    x = torch.randn(3, requires_grad=True)
    with count_saved([]) as saved, selective():
        y = recompute_in_backward(double, x, keeps_inputs_only=True)
        z = (y * y).sum()
    assert saved.bytes == x.numel() * 4  # what the square needs is computed again
    z.backward()
    assert torch.equal(x.grad, 8 * x)
    assert len(runs) == 2  # forward, and for the square
    with selective():
        recompute_in_backward(double, x, keeps_inputs_only=True).sum().backward()
    assert len(runs) == 3  # nothing needs the output


def with_result(function):
    """The gradients of a function's inputs; its result takes the place of its gradient."""

    def again(d, *inputs):
        result, gradients = run_again(function, inputs, [True] * len(inputs), d)
        d.copy_(result)
        return gradients

    return again


@pytest.mark.parametrize("kernel", [False, True], ids=["run again", "by one kernel"])
def test_the_operand_of_a_product_is_computed_again(groups, kernel):
    runs = []

    def scaled(x, scale):
        runs.append(1)
        return x.square() * scale

    def again(d, *inputs):
        return d, with_result(scaled)(d, *inputs)

    torch.manual_seed(0)
    leaves = [torch.randn(*n, requires_grad=True) for n in [(5, 4), (4,), (3, 4)]]
    x, scale, weight = leaves
    with count_saved([scale, weight]) as saved, selective():
        y = product_of(scaled, (x, scale), weight, False, again if kernel else None)
    assert saved.bytes == x.numel() * 4 and len(runs) == 1
    got = torch.autograd.grad(y.square().sum(), leaves)
    assert len(runs) == 2  # for the weight and for its own gradient
    expected = torch.autograd.grad((scaled(x, scale) @ weight.t()).square().sum(), leaves)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_nothing_is_left_behind_when_a_graph_is_dropped(groups):
    x = torch.randn(1000, requires_grad=True)
    with selective():
        y = recompute_in_backward(torch.exp, x)
        z = (y.exp() * y).sum()
    watch = weakref.ref(y)
    del y, z
    gc.disable()
    try:
        assert watch() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("letter", "Mm")
def test_selective_with_the_kernels_of_a_gpu(groups, letter, monkeypatch):
    """One adds and normalises, one adds gradients, and some leave their result as well."""

    def normalize(*given, **options):
        return multihead_norm(*given, backend="torch", **options)

    def add_norm(x, added, *given):
        total = x + added
        return total, normalize(total, *given, layout="row")

    def norm_again(d, h, weight, kind, eps, gate):
        return with_result(
            lambda h, weight, gate: normalize(h, weight, kind, eps, gate=gate, layout="by head")
        )(d, h, weight, gate)

    def norm_skip_again(d, h, weight, kind, eps, *rest):
        return with_result(lambda h, weight, *rest: norm_gated_skip(h, weight, kind, eps, *rest))(
            d, h, weight, *rest
        )

    def gated_again(d, gate_up, activation):
        return with_result(lambda x: gated_activation(x, activation))(d, gate_up)[0]

    monkeypatch.setattr(norm, "norm_backend", lambda *_: "triton")
    monkeypatch.setattr(norm, "multihead_norm", normalize)
    monkeypatch.setattr(norm, "add_norm", add_norm)
    monkeypatch.setattr(norm, "norm_beside", lambda x, *o: (x, normalize(x, *o, layout="row")))
    for mixer in (mlstm, mlstm_classic):
        monkeypatch.setattr(mixer, "head_norm_backend", lambda *_: "triton")
    monkeypatch.setattr(mlstm, "multihead_norm_again", norm_again)
    monkeypatch.setattr(mlstm_classic, "norm_gated_skip_again", norm_skip_again)
    monkeypatch.setattr(feed_forward, "gated_backend", lambda *_: "triton")
    monkeypatch.setattr(feed_forward, "gated_activation_again", gated_again)
    results = []
    for mode in ("none", "selective"):
        section = SECTION | {"pattern": letter, "dropout": 0.0}
        config = make_config(section, memory={"recompute": mode})
        layer = XLSTMLayer(config, layer_spec(letter, config).submodules, groups, layer_number=0)
        rng = torch.Generator().manual_seed(0)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=rng)
        x = torch.randn(24, 32, generator=rng).requires_grad_()
        layer(x, 2, None).square().sum().backward()
        results.append([x.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
