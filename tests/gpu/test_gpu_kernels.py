"""Triton kernels on a GPU against their torch twins. Nothing here has run on a GPU yet.

The checks themselves run on any machine, with the torch twin in the place of Triton.
"""

import time

import pytest
import torch

from benchmarks import kernels_gpu
from benchmarks.gpu_proof import correctness
from benchmarks.gpu_proof.setting import Setting
from pretrain.engines.gradients import sum_of_squares
from xlstm_kernels import (
    add_norm,
    mlstm_chunkwise,
    mlstm_step,
    multihead_norm,
    slstm_scan,
    slstm_step,
)


def test_all_checks_of_the_benchmark(gpu):
    results = kernels_gpu.check_correctness(gpu, "triton")
    wrong = [case for case in results if not case["ok"]]
    assert not wrong


def test_every_kernel_as_training_uses_it(gpu, tmp_path):
    """Gradients, boundaries, strides and soft caps, against fp64; twice, with equal bits."""
    wrong = [row for row in correctness.rows(Setting(tmp_path, dry=False)) if not row["ok"]]
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_carried_state(gpu, dtype):
    """Two segments with the state between them give what one sequence gives."""
    setting = kernels_gpu.Setting("carried", 2, 2, 300, 64, 128)
    x = [one.detach() for one in kernels_gpu.inputs_of(setting, dtype, gpu)]
    whole, last = mlstm_chunkwise(*x, return_last_state=True, backend="triton")
    parts, state = [], None
    for part in (slice(0, 100), slice(100, 300)):
        h, state = mlstm_chunkwise(
            *(one[:, :, part] for one in x), state, return_last_state=True, backend="triton"
        )
        parts.append(h)
    limit = kernels_gpu.LIMITS[dtype]
    assert (torch.cat(parts, 2) - whole).abs().max() <= limit * whole.abs().max()
    for got, expected in zip(state, last, strict=True):
        assert (got - expected).abs().max() <= limit * expected.abs().max()


def test_steps_give_what_the_sequence_gives(gpu):
    setting = kernels_gpu.Setting("steps", 2, 2, 20, 64, 128)
    x = [one.detach() for one in kernels_gpu.inputs_of(setting, torch.float32, gpu)]
    whole, last = mlstm_chunkwise(*x, return_last_state=True, backend="torch")
    state = [torch.zeros_like(one) for one in last]
    for t in range(20):
        h = mlstm_step(*(one[:, :, t] for one in x), state, backend="triton")
        assert (h - whole[:, :, t]).abs().max() <= 2e-4 * whole.abs().max()


@pytest.mark.parametrize("dim", [48, 512])
def test_slstm_steps_give_what_the_sequence_gives(gpu, dim):
    x, R, b = (
        one.detach() for one in kernels_gpu.slstm_inputs((17, 2, 8, dim), torch.float32, gpu)
    )
    whole, last = slstm_scan(x, R, b, return_last_state=True, backend="torch")
    state = [torch.zeros_like(one) for one in last]
    for t in range(8):
        h = slstm_step(x[:, t], R, b, state, backend="triton")
        assert (h - whole[:, t]).abs().max() <= 2e-4 * whole.abs().max()


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_gate(gpu, dtype, kind):
    """As the block hands them over: another order of axes, and a slice of a product."""
    x = torch.randn(2, 4, 300, 192, device=gpu).to(dtype).permute(2, 0, 1, 3)
    gate = torch.randn(300, 2, 8, 192, device=gpu).to(dtype)[:, :, 4:]
    inputs = [x, gate, torch.randn(4 * 192, device=gpu)]

    def run(inputs, backend):
        x, gate, weight = inputs = [one.detach().requires_grad_() for one in inputs]
        y = multihead_norm(x, weight, kind, 1e-5, gate=gate, backend=backend)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        return y, *torch.autograd.grad(y, inputs, upstream.to(y.device, y.dtype))

    got, expected = run(inputs, "triton"), run([one.float() for one in inputs], "torch")
    for a, b in zip(got, expected, strict=True):
        assert (a.float() - b).abs().max() <= kernels_gpu.LIMITS[dtype] * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_sum_and_its_norm(gpu, dtype):
    inputs = [torch.randn(300, 2048, device=gpu).to(dtype) for _ in range(2)]
    inputs.append(torch.randn(2048, device=gpu))

    def run(inputs, backend):
        x, added, weight = inputs = [one.detach().requires_grad_() for one in inputs]
        total, y = add_norm(x, added, weight, "rmsnorm", 1e-5, backend=backend)
        loss = total.float().sin().sum() + y.float().cos().sum()
        return total, y, *torch.autograd.grad(loss, inputs)

    got, expected = run(inputs, "triton"), run([one.float() for one in inputs], "torch")
    for a, b in zip(got, expected, strict=True):
        assert (a.float() - b).abs().max() <= kernels_gpu.LIMITS[dtype] * b.abs().max()


@pytest.mark.parametrize("name", ["mlstm", "slstm"])
def test_results_are_deterministic(gpu, name):
    if name == "mlstm":
        setting = kernels_gpu.Setting("same", 2, 3, 500, 64, 64)
        inputs, cell = kernels_gpu.inputs_of(setting, torch.bfloat16, gpu), mlstm_chunkwise
    else:
        inputs, cell = kernels_gpu.slstm_inputs((3, 2, 80, 64), torch.bfloat16, gpu), slstm_scan
    once, again = (
        kernels_gpu.forward_backward(lambda *x: cell(*x, backend="triton"), inputs)
        for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


def test_a_step_is_captured_in_a_graph(gpu):
    """slstm_scan records into a CUDA graph and replays on new inputs."""
    inputs = [x.detach() for x in kernels_gpu.slstm_inputs((2, 2, 16, 256), torch.bfloat16, gpu)]
    slstm_scan(*inputs, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h = slstm_scan(*inputs, backend="triton")
    inputs[0].neg_()
    graph.replay()
    assert torch.equal(h, slstm_scan(*inputs, backend="triton"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_of_steps_are_single_launches_bit_by_bit(gpu, dtype):
    from xlstm_kernels.slstm.triton import graphs
    from xlstm_kernels.slstm.triton.graph_check import check_graphs

    assert check_graphs(torch.empty(0, device=gpu, dtype=dtype), 512, 4, "sigmoid") == []
    assert list(graphs.GRAPHS._kept.values()).count(None) == 0  # none failed to be captured
    assert graphs.GRAPHS._kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_of_one_head_are_the_whole_sequence(gpu, dtype, monkeypatch):
    """A pass over states in two launches gives what the pass in one launch gives."""
    from xlstm_kernels.mlstm.triton import launches

    setting = kernels_gpu.Setting("segments", 1, 1, 1000, 64, 128)
    inputs = kernels_gpu.inputs_of(setting, dtype, gpu)

    def cell(*x):
        return mlstm_chunkwise(*x, backend="triton")

    cut = kernels_gpu.forward_backward(cell, inputs)
    monkeypatch.setattr(launches, "segments", lambda tiles, chunks: 1)
    whole = kernels_gpu.forward_backward(cell, inputs)
    for a, b in zip(cut, whole, strict=True):
        assert (a - b).abs().max() <= kernels_gpu.LIMITS[dtype] * b.abs().max()


# The benchmark's own code, where there is no GPU


def test_the_checks_find_nothing_wrong_with_the_twin(monkeypatch):
    monkeypatch.setattr(kernels_gpu, "CHECKS", [(1, 2, 20, 8, 16)])
    results = kernels_gpu.check_correctness("cpu", "torch")
    assert len(results) > 10 and all(case["ok"] for case in results), results


def test_the_checks_find_an_error(monkeypatch):
    def wrong(*x, backend, **more):
        return mlstm_chunkwise(*x, **more) * (1.001 if backend == "wrong" else 1)

    inputs = kernels_gpu.inputs_of(
        kernels_gpu.Setting("check", 1, 2, 20, 8, 16), torch.float32, "cpu"
    )
    assert kernels_gpu.worst_error("wrong", wrong, inputs) == pytest.approx(1e-3, rel=0.1)


def test_timing_runs_and_keeps_its_deadline(capsys):
    settings = [kernels_gpu.Setting("small", 1, 2, 32, 64, 64)]
    rows = kernels_gpu.time_everything(
        "cpu", "torch", settings, [(1, 2, 4, 8)], time.monotonic() + 60
    )
    ours = [row for row in rows if row["kind"].startswith("ours")]
    assert len(ours) == 4 and all(row["fw_bw_ms"]["median"] > 0 for row in ours)
    late = kernels_gpu.time_everything("cpu", "torch", settings, [], time.monotonic() - 1)
    assert all(row["left_out"] == "no time left" for row in late)
    assert "left out: no time left" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_benchmark_says_so(capsys, tmp_path):
    assert kernels_gpu.main(["--json", str(tmp_path / "x.json")]) == 0
    assert "no GPU here" in capsys.readouterr().out
    assert not (tmp_path / "x.json").exists()


def test_the_gradient_norm_is_added_in_fp64(gpu):
    tensors = [torch.randn(3_000_000, device=gpu), torch.randn(5, 7, device=gpu).bfloat16()]
    expected = sum(tensor.double().square().sum() for tensor in tensors)
    got = sum_of_squares(tensors, torch.device(gpu))
    assert got.dtype == torch.float64 and abs(got / expected - 1) < 1e-12
