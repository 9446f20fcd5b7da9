"""What a model asks of kernels, messages and products on a GPU, without one."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from pretrain.data.batch import Batch
from xlstm_kernels.common import products
from xlstm_mcore import hardware
from xlstm_mcore.build import make_config
from xlstm_mcore.megatron import cpu_runtime
from xlstm_mcore.mixers import kernel_calls
from xlstm_mcore.parallel import mlstm_state
from xlstm_mcore.parallel.context import ContextParallel

MODEL = {"pattern": "M", "hidden_size": 32, "num_heads": 2, "vocab_size": 64}


@pytest.mark.parametrize(
    ("states", "dtype"), [(None, None), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_the_type_of_kept_states_reaches_the_kernel(states, dtype, monkeypatch):
    asked = []
    monkeypatch.setattr(
        kernel_calls,
        "mlstm_chunkwise",
        lambda *inputs, states_dtype, **options: asked.append(states_dtype) or inputs[2],
    )
    config = make_config(MODEL, memory={"cell_states": states})
    q, gate = torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4)
    place = ContextParallel(SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    kernel_calls.run_mlstm(config, q, q, q, gate, gate, None, None, place)
    assert asked == [dtype]


def test_interleaved_stages_overlap_their_messages_but_not_on_gloo():
    nccl, interleaved = (cpu_runtime.pipeline_settings("nccl", virtual) for virtual in (1, 2))
    assert (nccl["batch_p2p_comm"], nccl["overlap_p2p_comm"]) == (True, False)
    assert (interleaved["batch_p2p_comm"], interleaved["overlap_p2p_comm"]) == (False, True)
    gloo = cpu_runtime.pipeline_settings("gloo", 2)
    assert (gloo["batch_p2p_comm"], gloo["overlap_p2p_comm"]) == (False, False)
    # True would make the host wait for the device at every message.
    assert not any(settings["batch_p2p_sync"] for settings in (nccl, interleaved, gloo))


def test_a_state_is_a_product_of_bf16_numbers_with_fp32_sums(monkeypatch):
    seen = []
    monkeypatch.setattr(
        mlstm_state, "product_in_fp32", lambda a, b: seen.append((a.dtype, b.dtype)) or a @ b
    )
    key = torch.randn(2, 5, 4)
    mlstm_state._own_state(key, torch.randn(2, 5, 6).bfloat16(), slice(0, 3))
    assert seen == [(torch.bfloat16, torch.bfloat16)]


def test_products_of_narrow_operands_are_not_widened_on_a_device():
    a, b = (torch.empty(2, 3, 3, dtype=torch.bfloat16, device="meta") for _ in "ab")
    found = products.product_in_fp32(a, b)
    assert found.dtype == torch.float32
    a, b = torch.randn(4, 5).bfloat16(), torch.randn(5, 6).bfloat16()
    assert torch.equal(products.product_in_fp32(a, b), a.float() @ b.float())


def test_a_batch_leaves_from_pinned_memory(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    Batch(*(torch.zeros(1, 4) for _ in range(5))).to("cpu")
    assert not pinned
    Batch(*(torch.zeros(1, 4) for _ in range(5))).to("meta")
    assert len(pinned) == 5
    # One that a rank has from another's device, as check_twice of guard.check_replicas has it.
    Batch(*(torch.zeros(1, 4, device="meta") for _ in range(5))).to("meta")
    assert len(pinned) == 5


def test_a_thread_pins_memory_for_the_device_of_its_process(monkeypatch):
    """A thread begins at device 0, where each rank would take memory for a context."""
    current, seen = [0], []

    @contextlib.contextmanager
    def device(chosen):
        before, current[0] = current[0], chosen.index
        yield
        current[0] = before

    class Runtime:
        @staticmethod
        def cudaHostRegister(address, size, flags):
            seen.append(current[0])
            return 1

    monkeypatch.setattr(hardware, "without_cuda", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    hardware.pin(torch.empty(8), torch.device("cuda", 3))
    assert seen == [3]
