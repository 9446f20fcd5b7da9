"""The compiled CPU loops of the sLSTM against the float64 step recurrence."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.comparison import assert_float32_close, relative_error, run
from tests.kernels.slstm.test_scan import outputs, split
from xlstm_kernels import slstm_scan
from xlstm_kernels.slstm.reference import slstm_recurrence

pytest.importorskip("numba", reason="the extra cpu (numba) is not installed")

SHAPES = {  # batch, heads, d: whole and part tiles, whole and part blocks of four rows
    "b1 h1 d16": (1, 1, 16),
    "b3 h4 d20": (3, 4, 20),
    "b4 h1 d32": (4, 1, 32),
    "b6 h2 d48": (6, 2, 48),
    "b3 h1 d192": (3, 1, 192),
}
GATES = {  # (igate, fgate) added to the random pre-activations, and their spread
    "usual": (0.0, 3.0, 1.0),
    "igate -10, fgate +6": (-10.0, 6.0, 0.5),
    "fgate -15": (0.0, -15.0, 1.0),
    "random +-15": (0.0, 0.0, 15.0),
    "small z and o": (0.0, 0.0, 1e-3),
}


def make_inputs(shape, s, gates="usual", state=False, seed=0):
    torch.manual_seed(seed)
    b, heads, d = shape
    igate, fgate, spread = GATES[gates]
    x = torch.randn(b, s, 4, heads, d)
    if spread == 15.0:
        x[:, :, :2] = x[:, :, :2].sign()
    x[:, :, : 4 if spread < 0.1 else 2] *= spread
    x[:, :, 0] += igate
    x[:, :, 1] += fgate
    scale = 1e-3 if spread < 0.1 else 1.0
    inputs = {
        "x": x,
        "R": scale * torch.randn(4, heads, d, d) * 0.6 * d**-0.5,
        "b": scale * torch.randn(4, heads, d) * 0.3,
    }
    if state:
        for name in ("h0", "c0", "m0"):
            inputs[name] = torch.randn(b, heads, d)
        inputs["n0"] = torch.rand(b, heads, d) + 0.5
    return inputs


def recurrence(x, **options):
    arguments, state = split(x)
    return outputs(*slstm_recurrence(*arguments, state, **options))


def scan(x, **options):
    arguments, state = split(x)
    result = slstm_scan(*arguments, state, return_last_state=True, backend="numba", **options)
    return outputs(*result)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("s", [1, 2, 63, 65])
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "carried"])
def test_values_states_and_gradients(shape, s, state):
    torch.manual_seed(5)
    boundaries = torch.rand(SHAPES[shape][0], s) < 0.1 if state else None
    inputs = make_inputs(SHAPES[shape], s, state=state)
    assert_float32_close(scan, recurrence, inputs, boundaries=boundaries)


@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
@pytest.mark.parametrize("gates", GATES)
def test_gates_at_their_extremes(gates, forget_gate):
    inputs = make_inputs((3, 2, 20), 33, gates, state=True)
    assert_float32_close(scan, recurrence, inputs, forget_gate=forget_gate)


@pytest.mark.parametrize("position", range(7))
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "carried"])
def test_boundary_at_every_position(position, state):
    boundaries = torch.zeros(3, 7, dtype=torch.bool)
    boundaries[1, position] = True
    inputs = make_inputs((3, 2, 20), 7, state=state)
    assert_float32_close(scan, recurrence, inputs, boundaries=boundaries)
    if state and position == 0:
        got = run(scan, inputs, torch.float32, boundaries=boundaries)
        for name in ("d_h0", "d_c0", "d_n0"):
            assert not got[name][1].any() and got[name][0].any()


def test_every_token_its_own_document():
    inputs = make_inputs((3, 2, 20), 9, state=True)
    boundaries = torch.ones(3, 9, dtype=torch.bool)
    assert_float32_close(scan, recurrence, inputs, boundaries=boundaries)


@pytest.mark.parametrize("cut", [1, 8])
def test_two_segments_with_carried_state_are_one_sequence(cut):
    def in_two(x, **_):
        (gates, R, b), state = split(x)
        h1, state = slstm_scan(gates[:, :cut], R, b, state, return_last_state=True, backend="numba")
        h2, state = slstm_scan(gates[:, cut:], R, b, state, return_last_state=True, backend="numba")
        return outputs(torch.cat([h1, h2], 1), state)

    assert_float32_close(in_two, recurrence, make_inputs((3, 2, 20), 17, state=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_lose_only_the_rounding_of_the_outputs(dtype):
    inputs = {name: x.to(dtype) for name, x in make_inputs((3, 2, 20), 33, state=True).items()}
    exact = run(recurrence, inputs, torch.float64)
    got = run(scan, inputs, dtype)
    assert got["h"].dtype == dtype and got["c"].dtype == torch.float32
    for name, reference in exact.items():
        assert relative_error(got[name], reference) < 1e-2, name


@pytest.mark.parametrize("size", [120.0, 1e4, 1e30])
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_finite_input_never_gives_nan(size, forget_gate):
    inputs = make_inputs((3, 2, 20), 10, state=True)
    inputs["x"] *= size
    for name, x in run(scan, inputs, torch.float32, forget_gate=forget_gate).items():
        assert x.isfinite().all(), name


def test_strided_inputs_more_threads_and_autocast_change_nothing():
    inputs = make_inputs((6, 2, 20), 11, state=True)
    expected = run(scan, inputs, torch.float32)
    strided = dict(inputs)
    for name in ("x", "R"):
        strided[name] = inputs[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.autocast("cpu", torch.bfloat16):
            got = run(scan, strided, torch.float32)
    finally:
        torch.set_num_threads(threads)
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-5)


def test_backward_leaves_what_was_saved_alone():
    inputs = [x.requires_grad_() for x in make_inputs((3, 2, 20), 9).values()]
    h = slstm_scan(*inputs, backend="numba")
    first = torch.autograd.grad(h.sum(), inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(h.sum(), inputs), strict=True):
        assert torch.equal(a, b)


def test_custom_op_follows_the_rules_of_torch():
    from xlstm_kernels.slstm.numba.scan import scan_forward

    x, R, b = (x.requires_grad_() for x in make_inputs((3, 2, 20), 5).values())
    state = [torch.rand(3, 2, 20, requires_grad=True) for _ in range(3)] + [torch.zeros(3, 2, 20)]
    boundaries = torch.zeros(3, 5, dtype=torch.bool)
    torch.library.opcheck(scan_forward, (x, R, b, *state, boundaries, True, "slstm"))
    torch.library.opcheck(scan_forward, (x.bfloat16(), R, b, *[None] * 5, False, "slstm"))


def test_float64_goes_to_the_torch_backend():
    x = [x.double() for x in make_inputs((1, 1, 16), 3).values()]
    assert torch.equal(slstm_scan(*x), slstm_scan(*x, backend="torch"))
    with pytest.raises(ValueError, match="float64"):
        slstm_scan(*x, backend="numba")


SCRIPT = """
import logging, torch
logging.basicConfig(level="INFO", format="%(message)s")
from xlstm_kernels import slstm_scan
from xlstm_kernels.slstm.numba import loops
x = torch.ones(1, 2, 4, 1, 16, requires_grad=True)
R, b = torch.zeros(4, 1, 16, 16), torch.zeros(4, 1, 16)
slstm_scan(x, R, b, backend="numba").sum().backward()
for loop in (loops.forward, loops.backward):
    print(sum(loop.stats.cache_hits.values()), sum(loop.stats.cache_misses.values()))
"""


def start(folder, **environment):
    """A process that uses the compiled loops, with numba's cache in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"NUMBA_CACHE_DIR": str(folder)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Hits and misses of the forward, then of the backward loop; and what was logged."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.split(), err


def test_compiled_code_is_kept_on_disk_by_processes_that_start_at_once(tmp_path):
    """And what one of them left broken is compiled again, with a word about it."""
    compiled, kept = ["0", "1"], ["1", "0"]  # of a loop, by either process
    for process in [start(tmp_path) for _ in range(2)]:
        counts, _ = finish(process)
        assert counts[:2] in (compiled, kept) and counts[2:] in (compiled, kept)
    counts, err = finish(start(tmp_path))
    assert counts == 2 * kept and "compiles" not in err
    indices = sorted(tmp_path.rglob("*.nbi"))
    assert len(indices) == 2
    for path in indices:
        path.write_bytes(path.read_bytes()[:20])
    counts, err = finish(start(tmp_path))
    assert counts[0] == counts[2] == "0"
    assert f"{tmp_path}" in err and "could not be read" in err and "NUMBA_CACHE_DIR" in err


def test_a_change_beside_the_loops_compiles_them_anew(monkeypatch, tmp_path):
    """Numba alone would look at the file of the loops, and not at what they call."""
    from xlstm_kernels.common.numba import compiled
    from xlstm_kernels.slstm.numba import loops

    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    stamps = []
    for text in ("before", "and after"):
        (tmp_path / "vectors.py").write_text(text)
        stamps.append(compiled.BestEffortCache(loops.forward.py_func)._cache_file._source_stamp)
    assert stamps[0] != stamps[1]


def test_no_folder_for_compiled_code_is_no_trouble(monkeypatch, caplog):
    """Installed read-only and no home: compiled in every process."""
    from numba.core.caching import CacheImpl

    from xlstm_kernels.common.numba import compiled

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    with caplog.at_level(logging.INFO, logger=compiled.__name__):
        double = compiled.compiled(lambda x: x + x)
    assert double(2) == 4 and "NUMBA_CACHE_DIR" in caplog.text


def test_a_full_disk_is_no_trouble(monkeypatch, caplog, tmp_path):
    from numba.core.caching import FunctionCache

    from xlstm_kernels.common.numba import compiled

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FunctionCache, "save_overload", full)
    double = compiled.compiled(lambda x: x + x)
    assert double(2) == 4
    assert "No space left on device" in caplog.text and "could not be written" in caplog.text
