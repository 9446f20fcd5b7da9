"""What the mLSTM on Triton promises without the interpreter: its choice, launches and grids."""

import importlib.util
import logging
import re
from pathlib import Path

import pytest
import torch

from xlstm_kernels import mlstm_chunkwise, mlstm_step
from xlstm_kernels.common import backends as select

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (pip install triton)", allow_module_level=True)

from benchmarks.kernel_variants.mlstm import (
    OTHERS,
    SETTINGS,
    phase_of,
    plan,
    plan_one_step,
    triton_variants,
)
from xlstm_kernels.common import triton_launch
from xlstm_kernels.mlstm.arguments import Inputs
from xlstm_kernels.mlstm.triton import buffers, tiles

KERNELS = Path(__file__).parents[3] / "kernels" / "xlstm_kernels"


def arguments(dtype=torch.float32):
    q = torch.randn(1, 2, 20, 16, dtype=dtype)
    return q, q.clone(), q.clone(), q[..., 0].clone(), q[..., 1].clone()


def test_cpu_tensors_run_on_torch_and_it_is_said_once(caplog):
    select._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="xlstm_kernels.common.backends"):
        for _ in range(2):
            mlstm_chunkwise(*arguments())
    said = [r.getMessage() for r in caplog.records if "mlstm_chunkwise" in r.getMessage()]
    assert len(said) == 1
    assert "'torch'" in said[0] and "not 'triton'" in said[0] and "CPU" in said[0]


def test_triton_on_cpu_tensors_is_refused():
    match = r"backend='triton' cannot run this mlstm_chunkwise: .*cpu.*TRITON_INTERPRET=1.*'torch'"
    with pytest.raises(ValueError, match=match):
        mlstm_chunkwise(*arguments(), backend="triton")
    one = [x[:, :, 0] for x in arguments()]
    state = (torch.zeros(1, 2, 16, 16), torch.zeros(1, 2, 16), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="backend='triton' cannot run this mlstm_step"):
        mlstm_step(*one, state, backend="triton")


def test_unknown_names_list_what_exists():
    with pytest.raises(ValueError, match=r"does not exist.*'triton', 'torch', or None"):
        mlstm_chunkwise(*arguments(), backend="warp")
    with pytest.raises(ValueError, match=r"states_dtype=torch.float16 is not known"):
        mlstm_chunkwise(*arguments(), states_dtype=torch.float16)


class OnDevice:
    """What `select_backend` looks at, on a device that this machine need not have."""

    def __init__(self, dtype):
        self.device, self.dtype = torch.device("xpu"), dtype


@pytest.mark.parametrize(
    "dtype, facts, expected",
    [
        (torch.bfloat16, {"qk_dim": 256, "v_dim": 512}, "triton"),
        (torch.float32, {"qk_dim": 16, "v_dim": 16, "chunk_size": 16}, "triton"),
        (torch.float64, {"qk_dim": 16, "v_dim": 16}, "torch"),
        (torch.float16, {"qk_dim": 16, "v_dim": 16}, "torch"),
        (torch.bfloat16, {"qk_dim": 1024, "v_dim": 1024}, "triton"),  # the classic 1.3B
        (torch.bfloat16, {"qk_dim": 1040, "v_dim": 1024}, "torch"),
        (torch.bfloat16, {"qk_dim": 16, "v_dim": 16, "chunk_size": 4}, "torch"),
    ],
)
def test_choice_on_a_gpu(dtype, facts, expected):
    assert select.select_backend("mlstm_chunkwise", None, OnDevice(dtype), **facts) == expected


def test_choice_without_triton(monkeypatch):
    monkeypatch.setattr(select, "_installed", lambda package: False)
    like = OnDevice(torch.bfloat16)
    facts = {"qk_dim": 256, "v_dim": 512}
    assert select.select_backend("mlstm_chunkwise", None, like, **facts) == "torch"
    with pytest.raises(ValueError, match=r"'triton' is not installed; pip install triton"):
        select.select_backend("mlstm_chunkwise", "triton", like, **facts)


@pytest.mark.parametrize("setting", SETTINGS)
def test_six_launches_beside_the_gates(setting):
    launches = plan("sm_90", **SETTINGS[setting])
    assert [one.name for one in launches if phase_of(one) == "gates"] == ["gates", "gate gradients"]
    assert sum(phase_of(one) != "gates" for one in launches) == 6


def test_one_head_fills_a_large_gpu_in_every_pass():
    one_head = {"b": 1, "heads": 1, "s": 32768, "qk": 256, "v": 512}
    # 128 tiles of states are left as they are: a second launch costs more than 4 SMs. The passes
    # over gates have a program for each chunk, and move less than a hundredth of the bytes.
    few = ("states", "state gradients", "gates", "gate gradients")
    for dtype in (torch.float32, torch.bfloat16):
        for one in plan("sm_90", **one_head, dtype=dtype):
            assert one.grid[0] >= (128 if one.name in few else 132), (one.name, one.grid)


def test_large_heads_keep_large_chunks_where_a_rank_has_few_of_them():
    """Smaller chunks mean more states between them. Tiles of the states fill the GPU anyway."""
    for heads, s, qk, v in ((1, 8192, 256, 512), (4, 2048, 1024, 1024)):
        for one in plan("sm_90", b=1, heads=heads, s=s, qk=qk, v=v):
            if one.name in ("states", "states resumed", "outputs"):
                assert one.arguments["L"] == 256 and one.grid[0] >= 128, (one.name, one.grid)


def test_grids_survive_large_batches():
    """All on the first axis, which may have 2^31 - 1 programs; the others stop at 65,535."""
    launches = plan("sm_90", b=64, heads=16, s=16384, qk=128, v=256, chunk=64)
    assert max(one.grid[0] for one in launches) > 65535
    for one in launches:
        assert len(one.grid) == 1 and one.grid[0] < 2**31


def test_more_gates_than_32_bits_count_are_refused():
    """9 planes of gates, or 5 for each tile of q: 2^31 numbers at most."""
    small = {"heads": 64, "s": 2**16, "qk": 16, "v": 16}
    plan("sm_90", b=56, **small)
    with pytest.raises(ValueError, match="57 rows of 64 heads and 65,536 tokens are 239,075,328"):
        plan("sm_90", b=57, **small)
    wide = small | {"qk": 1024}  # 8 tiles
    with pytest.raises(ValueError, match="count at most 53,687,091; use fewer rows at a time"):
        plan("sm_90", b=13, **wide)


def test_chunk_sizes():
    def pick(chunk_size, s, rows=8):
        return tiles.pick_chunk_size(chunk_size, rows, s, 256, 512)

    assert [pick(c, 8192) for c in (16, 63, 64, 128, 256, 4096)] == [16, 32, 64, 128, 256, 256]
    assert [pick(256, s) for s in (1, 16, 17, 65, 200, 10**6)] == [16, 16, 32, 128, 256, 256]
    assert [pick(None, s) for s in (20, 100, 200, 300, 8192)] == [32, 64, 128, 256, 256]
    assert [pick(None, s, rows=1) for s in (1024, 2048, 8192)] == [64, 128, 256]


@pytest.mark.parametrize("dim", [1, 16, 17, 96, 192, 384, 512, 1000, 1024])
def test_blocks_cover_a_dimension_without_much_padding(dim):
    width = tiles.block(dim, 128)
    padded = -(-dim // width) * width
    assert 16 <= width <= 128 and width & (width - 1) == 0
    assert padded * 6 <= dim * 7 or width <= 32


def test_tiles_survive_the_trip_through_a_custom_op():
    config = tiles.mlstm_config("sm_90", 96, 192, torch.bfloat16, 64, False)
    assert tiles.MlstmConfig.unflat(config.flat()) == config


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_variants_are_complete_and_named_apart(target):
    variants = triton_variants(target)
    names = [one.name for one in variants]
    assert len(set(names)) == len(names)
    kernels = {one.fn.__name__ for one in variants}
    sources = "".join(path.read_text() for path in (KERNELS / "mlstm").glob("triton/*.py"))
    assert kernels == set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))


def test_kernels_use_plain_pointers_and_no_float_atomics():
    """Block pointers are gone since Triton 3.9; float atomics are not deterministic."""
    paths = [path for path in KERNELS.rglob("*.py") if "triton" in str(path.relative_to(KERNELS))]
    assert len(paths) > 10
    for path in paths:
        text = path.read_text().replace("tl.atomic_add(arrived, ", "")  # an integer: programs
        for word in ("make_block_ptr", "tl.advance", "tensor_descriptor", "atomic", "autotune"):
            assert word not in text, (path.name, word)


def test_offsets_of_gradients_fit_32_bits_in_large_batches():
    """Where those over the tokens of a chunk would not, gradients do not lie by token."""
    by_token = torch.empty(300, 4096, 4, 1024, dtype=torch.bfloat16, device="meta")
    q = by_token.permute(1, 2, 0, 3)
    gradients = buffers.allocate_gradients(Inputs(q, q, q, q[..., 0], q[..., 0]), False)
    for one in (gradients.dq, gradients.dk, gradients.dv):
        assert buffers.readable(one) is one


def test_decoding_is_two_launches():
    launches = plan_one_step(b=16, heads=8, qk=256, v=512)
    assert [one.grid[0] for one in launches] == [16 * 8 * 8, 16 * 8]
    assert not triton_launch.INTERPRETED


@pytest.mark.parametrize(("setting", "once"), [(SETTINGS["7b"], False), (OTHERS["1.3b"], True)])
def test_gradients_of_pairs_are_computed_once_where_many_tiles_need_them(setting, once):
    """And where few do, a tensor of them would cost more to write and read."""
    launches = {one.name: one.arguments for one in plan("sm_90", **setting)}
    of_targets, of_pairs = launches["target gradients"], launches["query and key gradients"]
    assert (of_pairs["d_pairs"] is not None) == once
    assert of_targets["d_pairs"] is of_pairs["d_pairs"]
    assert (of_targets["v"] is not None) == once, "what is not read would be counted"
