"""Every cure of the CPU runtime: it works, and without it the same call fails."""

import contextlib
import importlib
import os
import sys

import pytest
import torch

from pretrain import layout as layouts
from pretrain.engines.megatron import MegatronEngine
from pretrain.trainer import train_step
from tests.dist import work
from xlstm_io.errors import ConfigError
from xlstm_mcore import hardware
from xlstm_mcore.inference import single_process_groups
from xlstm_mcore.megatron import compat, cpu_runtime

pytestmark = pytest.mark.skipif(
    not hardware.without_cuda(), reason="the CPU runtime is off where CUDA is present"
)


@pytest.fixture(scope="module", autouse=True)
def one_process():
    layout = layouts.start(work.run_config("large"))
    yield layout
    layout.close()


@pytest.fixture
def engine(one_process):
    return MegatronEngine(work.run_config("large"), one_process)


@contextlib.contextmanager
def without_stand_in(module_name):
    module = importlib.import_module(module_name)
    stand_in, module.torch = module.torch, torch
    try:
        yield
    finally:
        module.torch = stand_in


def one_step(engine):
    return train_step(engine, work.random_batches(engine.config, 0), 1e-3)


def test_all_loaded_megatron_modules_have_the_stand_in():
    cpu_runtime.activate()
    left_out = [
        name
        for name, module in sys.modules.items()
        if name.startswith("megatron.core") and vars(module).get("torch") is torch
    ]
    assert not left_out


def test_torch_itself_is_untouched():
    assert torch.cuda.current_device.__module__ == "torch.cuda"
    assert torch.Tensor.type(torch.zeros(1)) == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_activate_twice_changes_nothing():
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    clip = importlib.import_module("megatron.core.optimizer.clip_grads")
    before = (random.get_cuda_rng_tracker(), clip.torch, clip.clip_grad_by_total_norm_fp32)
    cpu_runtime.activate()
    assert before == (random.get_cuda_rng_tracker(), clip.torch, clip.clip_grad_by_total_norm_fp32)


def test_a_step_runs(engine):
    assert one_step(engine).grad_norm > 0


def test_stand_in_is_needed_in_a_step(engine):
    schedules = "megatron.core.pipeline_parallel.schedules"  # torch.zeros(device="cuda")
    with without_stand_in(schedules), pytest.raises((AssertionError, RuntimeError)):
        one_step(engine)


def test_stand_in_is_needed_for_megatrons_own_norm(one_process):
    """Our engine computes its own; Megatron-LM's trainer, which may use our layers, does not."""
    clip = importlib.import_module("megatron.core.optimizer.clip_grads")
    group = one_process.groups.mp
    assert clip.get_grad_norm_fp32([torch.full((4,), 2.0)], grad_stats_parallel_group=group) == 4.0
    with (
        without_stand_in("megatron.core.optimizer.clip_grads"),
        pytest.raises((AssertionError, RuntimeError)),
    ):
        clip.get_grad_norm_fp32([torch.ones(4)], grad_stats_parallel_group=group)


def test_stand_in_is_needed_to_build_layers(one_process):
    with (
        without_stand_in("megatron.core.tensor_parallel.layers"),
        pytest.raises((AssertionError, RuntimeError)),
    ):
        layers = importlib.import_module("megatron.core.tensor_parallel")
        config = work.run_config("large")
        from xlstm_mcore.build import make_config

        layers.ColumnParallelLinear(
            4,
            4,
            config=make_config(config.model),
            init_method=torch.nn.init.zeros_,
            tp_group=one_process.groups.tp,
        )


def test_clipping_asks_tensors_for_their_type():
    clip = importlib.import_module("megatron.core.optimizer.clip_grads")
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 2.0)
    clip.clip_grad_by_total_norm_fp32([parameter], 1.0, 4.0)
    assert torch.allclose(parameter.grad, torch.full((3,), 0.5))
    with pytest.raises(AssertionError):
        clip.clip_grad_by_total_norm_fp32.__wrapped__([parameter], 1.0, 4.0)


def test_the_optimizer_asks_parameters_for_their_type(one_process, monkeypatch):
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    optimizer_class = distributed.DistributedOptimizer
    monkeypatch.setattr(optimizer_class, "__init__", optimizer_class.__init__.__wrapped__)
    monkeypatch.setattr(cpu_runtime, "activate", lambda: True)
    with pytest.raises(TypeError, match="Wrapped parameters must be one of"):
        MegatronEngine(work.run_config("large"), one_process)


def test_tensor_methods_stay_on_the_cpu_inside_the_mode_only():
    value = torch.ones(2)
    with cpu_runtime._TensorMethods():
        assert value.cuda() is value
        assert value.type() == "torch.cuda.FloatTensor"
        assert value.type(torch.float64).dtype == torch.float64
    assert value.type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        value.cuda()


def test_rng_tracker_forks_advance_and_leave_the_outside_alone():
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random.model_parallel_cuda_manual_seed(5)
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with random.get_cuda_rng_tracker().fork():
        first = torch.rand(3)
    with random.get_cuda_rng_tracker().fork():
        second = torch.rand(3)
    assert not torch.equal(first, second)
    assert torch.equal(torch.rand(2), expected)
    random.model_parallel_cuda_manual_seed(5)
    with random.get_cuda_rng_tracker().fork():
        assert torch.equal(torch.rand(3), first)
    random.model_parallel_cuda_manual_seed(5, tp_rank=1)
    with random.get_cuda_rng_tracker().fork():
        assert not torch.equal(torch.rand(3), first)


def test_activation_recompute_replays_dropout():
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    parallel = importlib.import_module("megatron.core.tensor_parallel")
    random.model_parallel_cuda_manual_seed(5)

    def block(x):
        with random.get_cuda_rng_tracker().fork():
            return torch.nn.functional.dropout(x * x, 0.5)

    x = torch.randn(64, requires_grad=True)
    y = parallel.checkpoint(block, False, x)
    y.sum().backward()
    kept = y.detach() != 0
    assert torch.allclose(x.grad, torch.where(kept, 4 * x.detach(), torch.zeros(())))


def test_adam_state_without_step_fails_at_the_first_update(engine):
    for optimizer in engine.optimizer.megatron.chained_optimizers:
        for state in optimizer.optimizer.state.values():
            del state["step"]
    with pytest.raises(KeyError, match="step"):
        one_step(engine)


def test_step_counters_are_separate_tensors(engine):
    (optimizer,) = engine.optimizer.megatron.chained_optimizers
    compat.set_adam_step(optimizer.optimizer, 7)
    steps = [state["step"] for state in optimizer.optimizer.state.values()]
    assert len({id(step) for step in steps}) == len(steps) > 1
    one_step(engine)
    assert {float(step) for step in steps} == {8.0}


def test_a_process_uses_the_device_of_its_number_or_the_only_one_it_sees(capsys):
    assert hardware.device_index(3, 4) == 3
    assert capsys.readouterr().err == ""
    assert hardware.device_index(3, 1) == 0
    assert "LOCAL_RANK=3 sees one device and uses it" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"LOCAL_RANK=3.*2 devices.*--gpu-bind=none"):
        hardware.device_index(3, 2)


def test_a_gpu_that_cannot_multiply_bf16_numbers_is_refused(monkeypatch):
    monkeypatch.setattr(hardware, "without_cuda", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
    match = r"T4 has compute capability 7\.5.*8\.0.*VISIBLE_DEVICES="
    with pytest.raises(ConfigError, match=match):
        hardware.choose_device()
    with pytest.raises(ConfigError, match=match):
        single_process_groups()  # which leaves the current device as it is
    hardware.check_capability("NVIDIA A100", (8, 0))


def test_the_device_index_is_where_nccl_and_deepspeed_look(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(hardware, "without_cuda", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert hardware.process_group_options() == {"backend": "nccl"}
    assert chosen == [0] and os.environ["LOCAL_RANK"] == "0"
