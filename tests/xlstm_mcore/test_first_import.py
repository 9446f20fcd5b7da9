"""The first import of megatron-core leaves out what is not used, and what it compiles works."""

import gc
import importlib
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.large_runs import first_step, start_up
from pretrain.processes.workers import free_port
from xlstm_mcore.megatron import first_import

# A rank imports, and makes a step; then others import what it has left out.
STEP = """
import sys
from xlstm_mcore.megatron import first_import
import torch
before = torch.compile
first_import.import_megatron()
assert torch.compile is before
import pretrain.commands.run.train, pretrain.engines.megatron
unused = (
    "torch._dynamo", "torch._inductor", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "torch.distributed.tensor", "sympy", "setuptools", "pyarrow", "transformers",
    "deepspeed", "wandb", "tensorboard",
)
def unexpected():
    return [name for name in unused if name in sys.modules]
assert not unexpected() and "numba" not in sys.modules, unexpected()
from tests.dist import work
config = work.run_config("large")
engine, layout = work.make_engine(config)
work.train_steps(engine, layout, config, 0, 1)
assert not unexpected(), unexpected()
import triton
import torch.utils._triton
assert torch.utils._triton.has_triton_package()
import torch.utils.tensorboard, torch.utils.cpp_extension
import torch.distributed.checkpoint as checkpoint
import torch.distributed.fsdp, torch.distributed.tensor
assert checkpoint.metadata.Metadata(state_dict_metadata={}).state_dict_metadata == {}
for name, module in [*sys.modules.items()]:
    if name.startswith("torch") and module is not None:
        for word, value in [*vars(module).items()]:
            assert not isinstance(value, first_import._StandIn), (name, word)
            left = isinstance(value, type) and issubclass(value, first_import._NotImported)
            assert not left, (name, word)
"""


def test_a_rank_makes_a_step_without_what_megatron_imports_in_vain():
    code = ["-W", "ignore", "-c", STEP]
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    port = {"MASTER_PORT": str(free_port())}
    subprocess.run([sys.executable, *code], check=True, timeout=120, env=os.environ | place | port)


def test_a_stand_in_is_a_base_of_classes_and_cannot_be_used():
    with first_import._stand_ins(["torch.no_such_module"]):
        deep = importlib.import_module("torch.no_such_module.deep")

    class Other(deep.Thing):
        pass

    assert not isinstance(3, deep.Thing) and not hasattr(torch, "no_such_module")
    with pytest.raises(ImportError, match="left out"):
        Other()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("torch.no_such_module")


def test_imports_are_made_without_collections():
    with first_import.no_collections():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_mark_for_the_compiler_counts_once_the_compiler_is_there(monkeypatch):
    call = first_import._marked(
        lambda function, recursive: lambda: ("marked", recursive), recursive=False
    )(lambda: "plain")
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert call() == "plain"
    monkeypatch.setitem(sys.modules, "torch._dynamo", object())
    assert call() == ("marked", False)


def test_adam_leaves_gradients_on_and_its_update_has_none():
    first_import._leave_marks_out()
    step = torch.optim.Adam.step.__wrapped__
    first_import._leave_marks_out()
    assert torch.optim.Adam.step.__wrapped__ is step
    weight = torch.nn.Parameter(torch.ones(2))
    adam = torch.optim.AdamW([weight], lr=0.5)
    weight.sum().backward()
    adam.step()
    assert torch.is_grad_enabled() and weight.is_leaf and weight[0].item() < 0.6


def test_imports_are_measured_in_fresh_processes():
    found = start_up.measure_all({"little": "pass", "more": "import statistics, email.mime"}, 1)
    (little, few), (more, many) = found.values()
    assert 0 < little < 60 and 0 < more < 60 and few < many
    assert start_up.RANK in start_up.ROWS


def test_rates_of_a_start_are_measured():
    rates = first_step.measure(imports=1.0, shards=3, megabytes=1)
    assert rates.imports == 1 and 0 < rates.draw < rates.request < rates.first_batch
    assert 0 < rates.read < 1e-6


def test_a_function_is_compiled_at_its_first_call_and_once():
    compiled = []

    def compile_now(function, **options):
        compiled.append((function.__name__, options))
        return function

    def double(x):
        return 2 * x

    for make in (
        lambda: first_import._compile_at_first_call(compile_now, double, dynamic=True),
        lambda: first_import._compile_at_first_call(compile_now, dynamic=True)(double),
    ):
        compiled.clear()
        later = make()
        assert later.__name__ == "double" and not compiled
        assert [later(torch.ones(1)).item() for _ in range(2)] == [2, 2]
        assert compiled == [("double", {"dynamic": True})]


def test_a_compiled_method_finds_its_object():
    class Layer:
        factor = 3

        def scale(self, x):
            return self.factor * x

    Layer.scale = first_import._compile_at_first_call(lambda function: function, Layer.scale)
    assert Layer().scale(2) == 6
