"""Whether the persistent sLSTM fits a device, and what compilers make of it."""

import importlib.util
import itertools

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (pip install triton)", allow_module_level=True)

from benchmarks.kernel_variants import TARGETS, find_variants
from benchmarks.kernel_variants.persistent import SIZES
from pretrain.rehearsal.gpus import GPUS
from xlstm_kernels.common.backends import Like, select_backend
from xlstm_kernels.common.device_limits import Device
from xlstm_kernels.common.launch_graph import device_of
from xlstm_kernels.slstm.triton import persistent_scan
from xlstm_kernels.slstm.triton.persistent_group import (
    Group,
    misfit_reason,
    plan_group,
)


def plan(target, batch, heads, d):
    return plan_group(batch, heads, d, SIZES[target])


@pytest.mark.parametrize("target", SIZES)
def test_the_papers_heads(target):
    assert plan(target, 16, 4, 512) == Group(32, 16, 64, 16)
    assert plan(target, 4, 4, 192) == Group(32, 6, 24, 16)
    assert plan(target, 8, 4, 384) == Group(32, 12, 48, 16)
    assert plan(target, 1, 4, 1024) is None  # 256 programs of 16 columns


def test_what_fits_depends_on_the_processors():
    """128 programs: for 32 rows of the 1.3B, and for two heads of 1,024."""
    fits = {target: plan(target, 32, 4, 512) is not None for target in SIZES}
    assert fits == {"sm_80": False, "sm_90": True, "sm_100": True}
    assert plan("sm_90", 16, 2, 1024) == Group(16, 64, 128, 8)
    assert plan("sm_80", 16, 1, 1024) is None  # 192 KB of shared memory, where there are 163
    assert plan("sm_90", 33, 4, 512) is None


def test_weights_fit_and_every_program_has_a_processor():
    sizes = itertools.product((1, 16, 17, 64), (1, 2, 4, 8), (130, 256, 300, 512, 700, 1024))
    some = 0
    for (batch, heads, d), target in itertools.product(sizes, SIZES):
        group = plan(target, batch, heads, d)
        if group is None:
            continue
        some += 1
        assert group.programs <= SIZES[target].processors
        assert 8 * d * group.width < SIZES[target].shared
        assert group.tiles * group.width >= d
        assert group.programs == heads * group.tiles * -(-batch // 16)
        # All programs of a block of rows hold R once.
        assert group.tiles * 8 * d * group.width >= 8 * d * d
    assert some > 100


@pytest.mark.parametrize(
    ("like", "facts", "reason"),
    [
        (torch.float32, {"d": 512}, "weights in bfloat16 and is given torch.float32"),
        (torch.bfloat16, {"d": 512, "cell": "slstm_sigmoid"}, "exponential input gate only"),
        (
            torch.bfloat16,
            {"d": 1024, "heads": 4},
            "1 rows of 4 heads of 1024 are 256 programs that must run at the same time, and the "
            "GPU has 132 processors; use 'triton'",
        ),
    ],
    ids=["fp32", "sigmoid", "programs"],
)
def test_a_call_that_cannot_run_says_why(monkeypatch, like, facts, reason):
    monkeypatch.setattr(persistent_scan, "device_of", lambda device: SIZES["sm_90"])
    with pytest.raises(ValueError, match="backend='persistent' cannot run") as caught:
        select_backend("slstm_scan", "persistent", Like(torch.device("cuda"), like), **facts)
    assert reason in str(caught.value)


def test_memory_and_devices_without_limits():
    assert "196,608 bytes of shared memory" in misfit_reason(1, 1, 1024, SIZES["sm_80"])
    assert misfit_reason(16, 4, 512, SIZES["sm_80"]) is None
    assert device_of(torch.device("cpu")) is None
    assert plan_group(64, 8, 1024, None).width == 32


def test_gpus_of_the_planner_are_those_that_are_compiled_for():
    names = {"a100": "sm_80", "a100-40": "sm_80", "h100": "sm_90", "h200": "sm_90"}
    for name, gpu in GPUS.items():
        assert Device(gpu.processors, gpu.shared) == SIZES[names.get(name, "sm_100")]


def test_launches_are_described_for_nvidia_only():
    module = "benchmarks.kernel_variants.persistent"
    for target in TARGETS:
        variants = find_variants(target, module)
        assert bool(variants) == (target in SIZES)
        for one in variants:
            assert one.cooperative and one.grid[0] <= SIZES[target].processors and one.steps == 2048
    names = {one.name for one in find_variants("sm_90", module)}
    assert {"slstm persistent fw d512", "slstm persistent bw d512"} <= names
