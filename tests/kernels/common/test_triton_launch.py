"""What holds for every Triton launch, and can be seen without a GPU and without the interpreter."""

import contextlib
import importlib.util
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (pip install triton)", allow_module_level=True)

from benchmarks.kernel_variants import TARGETS, find_variants
from benchmarks.kernel_variants.variant import POINTERS
from xlstm_kernels.common import triton_launch
from xlstm_kernels.common.device_limits import SMALL_SHARED
from xlstm_kernels.conv import triton as conv_triton
from xlstm_kernels.mlstm.triton import chunkwise as chunkwise_triton
from xlstm_kernels.mlstm.triton import step as mlstm_step
from xlstm_kernels.norm import triton as norm_triton
from xlstm_kernels.slstm.operator import Kept
from xlstm_kernels.slstm.triton import scan as scan_triton
from xlstm_kernels.slstm.triton import step as slstm_step

MODULES = (conv_triton, norm_triton, chunkwise_triton, mlstm_step, scan_triton, slstm_step)


def new(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def wide(*shape):
    return new(*shape, dtype=torch.float32)


@pytest.mark.parametrize("target", TARGETS)
def test_every_grid_lies_on_the_first_axis(target):
    """It may have 2^31 - 1 programs; the others stop at 65,535."""
    for variant in find_variants(target):
        assert len(variant.grid) == 1 and 0 < variant.grid[0] < 2**31, variant.name


def test_pointers_are_called_as_triton_calls_them():
    """Compiled by another name a kernel is another one, and a launch does not find it."""
    from triton._utils import canonicalize_dtype

    for dtype, pointer in POINTERS.items():
        assert pointer == f"*{canonicalize_dtype(dtype)}"


@pytest.mark.parametrize("target", SMALL_SHARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resident_matrices_of_the_slstm_fit_small_gpus(target, dtype):
    for d in (16, 64, 100, 128, 256):
        tiles = scan_triton.tiles_for(target, d, dtype)
        if not tiles.inner:
            assert 4 * tiles.width**2 * dtype.itemsize < 99 << 10


@pytest.fixture
def launched(monkeypatch):
    """Names of the launches, which do nothing here: tensors have no values to be read back."""
    names = []

    def record(launches, like):
        names.extend(launch.name for launch in launches)

    for module in MODULES:
        monkeypatch.setattr(module, "run_all", record)
        if hasattr(module, "architecture"):
            monkeypatch.setattr(module, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    return names


def slstm_arguments(s, d):
    return new(2, s, 4, 2, d), wide(4, 2, d, d), wide(4, 2, d)


@pytest.mark.parametrize("d, passes", [(64, (1, 1)), (192, (1, 1)), (512, (6, 7))])
def test_slstm_is_a_fixed_list_of_launches(launched, d, passes):
    """So a GPU graph can capture it: what is launched and allocated depends on shapes alone."""
    starts = torch.empty(2, 6, dtype=torch.bool, device="meta")
    state = [wide(2, 2, d) for _ in range(4)]
    preacts, weight, bias = slstm_arguments(6, d)
    out, _, saved = scan_triton.forward(preacts, weight, bias, state, starts, True, "slstm")
    assert len(launched) == passes[0]
    launched.clear()
    kept = Kept(weight, state[0], starts, out, saved)
    scan_triton.backward(kept, out, state[:3], True, "slstm")
    assert len(launched) == passes[1]


def test_steps_are_a_fixed_list_of_launches(launched):
    preacts, weight, bias = slstm_arguments(1, 512)
    state = [wide(2, 2, 512) for _ in range(4)]
    slstm_step.slstm_step_triton._init_fn(preacts[:, 0], weight, bias, *state, True)
    q, gate = new(2, 2, 64), wide(2, 2)
    state = wide(2, 2, 64, 64), wide(2, 2, 64), wide(2, 2)
    mlstm_step._step._init_fn(q, q, q, gate, gate, *state, "exp", True, 1e-6, 15.0)
    assert launched == ["slstm decode", "step", "step of the normalizer"]


def test_the_other_passes_read_nothing_back(launched):
    q, gate = new(2, 2, 300, 64), wide(2, 2, 300)
    starts = torch.empty(2, 300, dtype=torch.bool, device="meta")
    inputs, options = (q, q, q, gate, gate), (128, True, True, 1e-6, False, 15.0, None)
    h, *saved, C, n, _ = chunkwise_triton.mlstm_forward._init_fn(
        *inputs, None, None, None, starts, True, *options
    )
    chunkwise_triton.mlstm_backward._init_fn(*inputs, h, saved, h, C, n, True, *options)
    assert {"gates", "outputs", "gate gradients"} <= set(launched)
    x, weight = new(4, 2, 3, 64), wide(192)
    y = norm_triton.norm_op._init_fn(x, weight, x, 1e-6, True, "heads last")
    norm_triton.norm_backward_op._init_fn(y, None, x, weight, x, 1e-6, True, "heads last")
    x, weight, bias = new(2, 300, 64), wide(64, 4), wide(64)
    y = conv_triton.conv_triton._init_fn(x, weight, bias, None, starts, True)
    conv_triton.conv_gradients._init_fn(y, x, weight, bias, None, starts, True, y, y)
    assert launched[-4:] == ["norm_forward", "norm_backward", "conv_forward", "conv_backward"]


@pytest.mark.parametrize(
    ("target", "version", "warned"),
    [("sm_90", "12.9.86", 1), ("sm_90", "13.4.59", 0), ("sm_80", "12.9.86", 0)],
)
def test_an_old_assembler_for_hopper_is_said_once(target, version, warned, monkeypatch, caplog):
    from triton.backends.nvidia import compiler

    tool = SimpleNamespace(version=version, path="/usr/bin/ptxas")
    monkeypatch.setattr(compiler, "get_ptxas", lambda arch: tool)
    triton_launch.warn_of_old_assembler.cache_clear()
    for _ in range(2):
        triton_launch.warn_of_old_assembler(target)
    assert len(caplog.records) == warned
    assert all("TRITON_PTXAS_PATH" in record.message for record in caplog.records)
    triton_launch.warn_of_old_assembler.cache_clear()
