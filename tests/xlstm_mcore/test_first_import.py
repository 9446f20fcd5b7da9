"""The first import of megatron-core leaves out what is not used, and what it compiles works."""

import subprocess
import sys

import torch

from benchmarks import start_up
from xlstm_mcore.megatron import first_import

IMPORT = """
import sys
from xlstm_mcore.megatron.first_import import import_megatron
import torch
before = torch.compile
import_megatron()
assert torch.compile is before
import pretrain.trainer
import pretrain.engines.megatron
unused = ("torch._dynamo", "torch._inductor", "deepspeed", "wandb", "tensorboard")
loaded = [name for name in unused if name in sys.modules]
assert not loaded, loaded
import torch.utils.tensorboard  # is there when a run asks for it
"""


def test_a_rank_starts_without_the_compiler_and_without_logs_of_others():
    subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORT], check=True, timeout=120)


def test_imports_are_measured_in_fresh_processes():
    found = start_up.measure_all({"little": "pass", "more": "import statistics, email.mime"}, 1)
    (little, few), (more, many) = found.values()
    assert 0 < little < 60 and 0 < more < 60 and few < many
    assert start_up.RANK in start_up.ROWS


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
