"""What runs in PyTorch on a GPU too is said before the run, at its start, and in its plan."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.commands.before_run import plan
from pretrain.commands.before_run.check import describe_run
from pretrain.config import load_config
from pretrain.config.checks import kernels
from pretrain.config.checks.kernels import on_pytorch
from pretrain.rehearsal.gpus import gpu_named
from pretrain.watching.summary import describe_start
from tests.pretrain.run_files import config, message

RUN_FILES = Path(__file__).parents[2] / "pretrain" / "configs"
WIDE = {"model__pattern": "mms", "model__hidden_size": 2560}  # the 2.7B's heads
SAID = (
    "the mLSTM of m blocks runs in PyTorch on a GPU too, slower than a Triton kernel: its heads "
    "are 1,280 wide, at most 1,024 can be; use a larger model.num_heads"
)


def test_wide_heads_are_named_before_the_run_at_its_start_and_in_its_plan():
    wide = config(**WIDE)
    assert f"slow              {SAID}\n" in describe_run(wide)
    assert SAID in list(plan._text([], 8, gpu_named("h100"), wide))
    start = {"checkpoint": None, "changes": [], "notes": [], "state": SimpleNamespace(step=0)}
    start["cursor"] = SimpleNamespace(consumed_samples=0)
    data = SimpleNamespace(num_rows=1, summary=lambda samples: "")
    for device in ("meta", "cpu"):
        layout = SimpleNamespace(device=torch.device(device), backend="", world_size=1, dp_size=1)
        engine = SimpleNamespace(num_parameters=1)
        lines = describe_start(wide, layout, engine, data, SimpleNamespace(**start))
        assert (SAID in lines) == (device == "meta")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__pattern": "ss", "model__hidden_size": 4160}, "the sLSTM of s blocks"),
        ({"model__pattern": "MM", "model__hidden_size": 4160}, "the norm of blocks"),
        ({"model__pattern": "s", "model__slstm_input_gate": "sigmoid"}, "only exp can be"),
        ({"model__pattern": "M", "model__chunk_size": 8}, "at least 16 can be; leave it out"),
        ({"model__pattern": "l"}, "the LSTM of l blocks"),
        ({"model__pattern": "m", "model__qkv_block_size": 64}, "makes tiles of 64 in heads of 64"),
    ],
)
def test_every_other_reason_is_named(changes, says):
    assert any(says in one for one in on_pytorch(config(**changes)))
    assert on_pytorch(config(**changes, model__kernel_backend="torch")) == []


def test_what_is_asked_for_on_triton_and_cannot_be_is_an_error():
    says = "model.kernel_backend=triton, but the mLSTM of m blocks has no Triton kernel here"
    assert says in message(**WIDE, model__kernel_backend="triton")


def test_of_the_run_files_only_those_with_wide_heads_run_in_pytorch():
    keys = {"run.dir": "unused", "data.path": "unused"}
    slow = {
        path.stem: on_pytorch(load_config(path, keys, quiet=True))
        for path in RUN_FILES.glob("*.yaml")
    }
    assert {name for name, found in slow.items() if found} == {
        "xlstm_2.7b_1to0", "xlstm_2.7b_7to1", "lstm_350m"
    }  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_limits_are_those_of_the_kernels():
    from xlstm_kernels.mlstm.triton import tiles
    from xlstm_kernels.norm import triton as norm
    from xlstm_kernels.qkv import triton as qkv
    from xlstm_kernels.slstm.triton import scan

    assert {tiles.MOST_QK, tiles.MOST_V, scan.MOST} == {kernels.WIDEST_HEAD}
    assert norm.MOST == kernels.WIDEST_NORM
    assert tiles.CHUNK_SIZES[0] == kernels.LEAST_CHUNK
    assert qkv.TILES == kernels.QKV_TILES
