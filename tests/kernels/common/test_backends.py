"""The choice of a backend: by device, dtype and shape, said once, overridden by name."""

import logging

import pytest
import torch

from xlstm_kernels import causal_conv1d, multihead_norm, slstm_scan
from xlstm_kernels.common import backends as select


@pytest.fixture
def said(caplog):
    """What was said since the start of the test."""
    select._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=select.__name__):
        yield lambda: [r.getMessage() for r in caplog.records if r.name == select.__name__]


def slstm(dtype=torch.float32, d=4, **options):
    shapes = (1, 2, 4, 1, d), (4, 1, d, d), (4, 1, d)
    return slstm_scan(*(torch.zeros(shape, dtype=dtype) for shape in shapes), **options)


def test_the_dtype_decides_and_each_choice_is_said_once_with_its_reasons(said):
    pytest.importorskip("numba", reason="the extra cpu (numba) is not installed")
    for _ in range(2):
        slstm()
        slstm(torch.float64)
    first, second = said()
    assert "slstm_scan on cpu: backend 'numba'" in first
    assert "backend 'torch'" in second and "not 'numba'" in second and "float64" in second


def test_a_missing_package_is_named_with_its_remedy(said, monkeypatch):
    monkeypatch.setattr(select, "_installed", lambda package: False)
    slstm()
    (line,) = said()
    assert "backend 'torch'" in line and "pip install numba" in line
    with pytest.raises(ValueError, match=r"cannot run this slstm_scan: .*pip install numba"):
        slstm(backend="numba")


def test_the_one_asked_for_runs_and_it_is_said(said):
    for _ in range(2):
        slstm(backend="torch")
    assert said() == ["slstm_scan on cpu: backend 'torch' (asked for)"]


@pytest.mark.parametrize(
    "call, names",
    [
        (lambda **x: slstm(**x), "'triton', 'numba', 'persistent', 'torch'"),
        (
            lambda **x: causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(3, 4), **x),
            "'triton', 'numba', 'torch'",
        ),
        (
            lambda **x: multihead_norm(torch.zeros(2, 3), torch.zeros(6), "rmsnorm", 1e-6, **x),
            "'triton', 'numba', 'torch'",
        ),
    ],
)
def test_an_unknown_name_lists_what_exists(call, names):
    with pytest.raises(ValueError, match=f"backend='warp' does not exist.*use one of {names}"):
        call(backend="warp")


def test_the_shape_decides(monkeypatch, said):
    """A backend that refuses large heads is passed over for them alone."""

    class Small:
        @staticmethod
        def unsupported_reason(like, *, d, asked):
            return "a head above 8; use 'torch'" if d > 8 else None

    backends = (select.Backend("small", "small"), select.TORCH)
    monkeypatch.setitem(select.BACKENDS, "slstm_step", backends)
    monkeypatch.setattr(select, "import_module", lambda name: Small)
    x = torch.zeros(1)
    assert select.select_backend("slstm_step", None, x, d=8) == "small"
    assert select.select_backend("slstm_step", None, x, d=9) == "torch"
    assert "not 'small': a head above 8" in said()[-1]
    with pytest.raises(ValueError, match=r"cannot run this slstm_step: a head above 8"):
        select.select_backend("slstm_step", "small", x, d=9)
