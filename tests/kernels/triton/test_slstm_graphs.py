"""The sLSTM's steps as graphs: equal to single launches bit by bit, with a graph that is played."""

import contextlib
import inspect
from functools import partial

import pytest
import torch

from tests.kernels.comparison import run
from tests.kernels.slstm.test_numba import make_inputs
from tests.kernels.slstm.test_scan import outputs, split
from tests.kernels.triton.fake_graph import FakeCuda
from xlstm_kernels import self_check, slstm_scan
from xlstm_kernels.common import launch_graph
from xlstm_kernels.common.launch_graph import GraphCache
from xlstm_kernels.self_check import check_slstm
from xlstm_kernels.slstm.triton import graph_check, graphs
from xlstm_kernels.slstm.triton import scan as scan_triton

SHAPE, SEGMENT = (2, 1, 16), 2


@pytest.fixture
def small(monkeypatch):
    """Heads of 16 take a launch per step, and a graph has two steps."""
    tiles = scan_triton.Tiles(16, True, 16, 4, 1)
    monkeypatch.setattr(scan_triton, "tiles_for", lambda *_: tiles)
    monkeypatch.setattr(graphs, "SEGMENT", SEGMENT)
    monkeypatch.setattr(graphs, "GRAPHS", GraphCache(graphs.MOST_GRAPHS))


@pytest.fixture
def cuda(small, monkeypatch):
    return FakeCuda(monkeypatch)


def scan(x, **options):
    arguments, state = split(x)
    result = slstm_scan(*arguments, state, return_last_state=True, backend="triton", **options)
    return outputs(*result)


def plain(function):
    """What `function` gives by single launches."""
    with launch_graph.without_graphs():
        return function()


def assert_bits(got, expected):
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(got[name], x), name


def some(s, seed, state=True, dtype=torch.float32):
    """Inputs and boundaries inside and at the borders of segments."""
    inputs = {k: x.to(dtype) for k, x in make_inputs(SHAPE, s, state=state, seed=seed).items()}
    boundaries = torch.zeros(SHAPE[0], s, dtype=torch.bool)
    boundaries[0, 2 + seed] = boundaries[1, 1 + seed] = True
    return inputs, boundaries


@pytest.mark.parametrize("state", [True, False], ids=["carried", "fresh"])
def test_graphs_are_single_launches_bit_by_bit(cuda, state):
    """Values, states and gradients, over two inputs; 4 of 5 steps are replayed."""
    for seed in (0, 1):
        inputs, boundaries = some(5, seed, state)
        both = partial(run, scan, inputs, torch.float32, boundaries=boundaries)
        expected = plain(both)
        cuda.single = 0
        assert_bits(both(), expected)
        # A step is left, and the gradient of the first state; the first call warms up both.
        assert cuda.single == 1 + 2 + (2 if seed == 0 else 0)
    assert [len(one.launches) for one in cuda.graphs] == [SEGMENT, SEGMENT + 1]
    assert [one.replays for one in cuda.graphs] == [4, 4]


def test_bfloat16_without_boundaries(cuda):
    inputs, _ = some(4, 0, dtype=torch.bfloat16)
    expected = plain(lambda: run(scan, inputs, torch.bfloat16))
    assert_bits(run(scan, inputs, torch.bfloat16), expected)
    assert [one.replays for one in cuda.graphs] == [2, 2]


def test_what_a_call_returned_outlives_the_next_call(cuda):
    """Two layers: both forward passes, then both backward passes in the opposite order."""

    def two_layers():
        given = [some(4, seed) for seed in (0, 1)]
        leaves = [{k: x.clone().requires_grad_() for k, x in one.items()} for one, _ in given]
        hs = [scan(x, boundaries=b)["h"] for x, (_, b) in zip(leaves, given, strict=True)]
        kept = [h.detach().clone() for h in hs]
        for h in reversed(hs):
            (h * torch.arange(h.numel()).view_as(h)).sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(hs, kept, strict=True))
        found = {f"h {n}": h.detach() for n, h in enumerate(hs)}
        return found | {f"{k} {n}": x[k].grad for n, x in enumerate(leaves) for k in "xRb"}

    expected = plain(two_layers)
    assert_bits(two_layers(), expected)
    assert len(cuda.graphs) == 2


def test_lengths_and_layers_share_a_graph_and_other_shapes_do_not(cuda):
    def forward(s, shape=SHAPE, **options):
        (gates, R, b), state = split(make_inputs(shape, s, state=True))
        slstm_scan(gates, R, b, state, backend="triton", **options)
        return len(cuda.graphs)

    assert forward(4) == forward(3) == forward(2) == 1
    assert forward(2, forget_gate="exp") == 2
    assert forward(2, boundaries=torch.zeros(2, 2, dtype=torch.bool)) == 3
    assert forward(2, (3, 1, 16)) == 4
    cuda.stream = 8  # its own buffers: nothing orders two streams
    assert forward(2) == 5
    cuda.stream = 7
    assert forward(2) == 5


def test_the_graphs_that_were_used_longest_ago_are_freed(cuda, monkeypatch):
    monkeypatch.setattr(graphs, "GRAPHS", GraphCache(2))
    for batch in (1, 2, 1, 3, 1):
        x, R, b = make_inputs((batch, 1, 16), 2).values()
        slstm_scan(x, R, b, backend="triton")
    assert [one.freed for one in cuda.graphs] == [False, True, False]
    graphs.GRAPHS.clear()
    assert all(one.freed for one in cuda.graphs)


def test_a_sequence_shorter_than_a_graph_is_launched(cuda):
    x, R, b = make_inputs(SHAPE, 1).values()
    slstm_scan(x, R, b, backend="triton")
    assert not cuda.graphs and cuda.single == 1


def test_inside_a_capture_the_steps_are_recorded(cuda, monkeypatch):
    x, R, b = make_inputs(SHAPE, 4).values()
    recorded = []

    def record(launches, like):
        recorded.extend(launches)

    monkeypatch.setattr(scan_triton, "run_all", record)
    monkeypatch.setattr(cuda, "capturing", object())
    slstm_scan(x, R, b, backend="triton")
    assert len(recorded) == 4 and not cuda.graphs


def test_a_capture_that_fails_ends_the_call_and_says_what_to_do(cuda):
    """Going on is not safe: torch's allocator stays in the capture."""
    cuda.fails = RuntimeError("operation failed due to a previous error during capture")
    x, R, b = make_inputs(SHAPE, 4).values()
    message = "slstm step.*previous error during capture.*memory.slstm_form: persistent"
    with pytest.raises(RuntimeError, match=message):
        slstm_scan(x, R, b, backend="triton")


def test_an_error_of_ours_is_not_taken_for_a_failed_capture(cuda):
    cuda.fails = TypeError("a bug")
    x, R, b = make_inputs(SHAPE, 4).values()
    with pytest.raises(TypeError, match="a bug"):
        slstm_scan(x, R, b, backend="triton")


def test_generation_may_come_before_training(cuda):
    """Buffers that were made in inference mode could not be written outside of it."""
    inputs, boundaries = some(4, 0)
    expected = plain(lambda: run(scan, inputs, torch.float32, boundaries=boundaries))
    with torch.inference_mode():
        again = scan(inputs, boundaries=boundaries)
    assert torch.equal(again["h"], expected["h"])
    assert_bits(run(scan, inputs, torch.float32, boundaries=boundaries), expected)


def test_graphs_take_no_part_in_the_other_forms(monkeypatch):
    monkeypatch.setattr(graphs, "run_segments", lambda *_: pytest.fail("no single steps here"))
    x, R, b = make_inputs((1, 1, 16), 2).values()
    slstm_scan(x, R, b, backend="triton")


def test_an_argument_without_a_role_is_noticed(small):
    x, R, b = make_inputs(SHAPE, 4).values()
    state = [torch.zeros(2, *SHAPE), *(torch.zeros(SHAPE) for _ in range(3))]
    kept = dict(zip(scan_triton.KEPT, scan_triton.kept_buffers(x), strict=True))
    out = torch.empty_like(x[:, :, 0])
    plan = scan_triton.plan_forward(x, R, b, None, state, out, kept, True, "interpreter")
    roles = scan_triton.FORWARD._replace(constant=("weight",))
    with pytest.raises(AssertionError, match=r"no role is known of \['bias'\]"):
        graphs.Segment(next(plan), roles, SEGMENT)


def test_a_run_compares_graphs_with_launches_before_it_trains(cuda, monkeypatch):
    monkeypatch.setattr(graph_check, "SEGMENT", SEGMENT)
    options = {"head_dim": 16, "heads": 1, "backend": "triton"}
    monkeypatch.setattr(self_check, "_compare_scans", lambda *_: [])
    assert check_slstm("cpu", torch.float32, **options) == []
    assert len(cuda.graphs) == 2 and all(one.replays for one in cuda.graphs)
    cuda.graphs[0].launches.pop()  # a graph that lost a step
    found = check_slstm("cpu", torch.float32, **options)
    assert found[0].startswith("slstm_scan on cpu as graphs, hidden states: not the bits")


def test_where_a_graph_can_be_captured(monkeypatch):
    gpu = torch.device("cuda", 0)
    for capturing, expected in ((False, True), (True, False)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
        assert launch_graph.can_capture(gpu) == expected
        assert not plain(lambda: launch_graph.can_capture(gpu))
        assert not launch_graph.can_capture(torch.device("cpu"))
        assert not launch_graph.can_capture(torch.device("xpu", 0))


def test_torch_has_what_a_capture_takes():
    assert "capture_error_mode" in inspect.signature(torch.cuda.graph.__init__).parameters
    assert {"replay", "reset"} <= set(dir(torch.cuda.CUDAGraph))
    with contextlib.suppress(AssertionError, RuntimeError):  # this torch may have no CUDA
        assert isinstance(torch.cuda.current_stream().cuda_stream, int)
