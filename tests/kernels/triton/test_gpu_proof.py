"""The cases of `benchmarks.gpu_proof` at tiny sizes, on the kernels that a GPU would run."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu_proof import correctness
from benchmarks.gpu_proof.setting import Setting
from xlstm_kernels.common.triton_launch import Launch

torch.set_num_threads(1)


class Interpreted(Setting):
    """A dry run on Triton's interpreter."""

    backend = "triton"


SETTING = Interpreted(Path(), True)
CASES = {(name, dtype): rest for name, dtype, *rest in correctness.cases(SETTING)}
# Others take longer here than they tell: their own modules test these kernels.
NAMES = [
    "mLSTM of the 7B, one head",
    "mLSTM of the 1.3B",
    "head norm, skip and gate",
    "convolution, q, k, v and gates",
]
SEGMENTS = [
    f"{name}{part}"
    for name in ("states", "state gradients")
    for part in (" of segments", " resumed")
]


@pytest.mark.parametrize("name", NAMES)
def test_a_sound_kernel_is_far_within_the_limit(name, monkeypatch):
    launched, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda one: launched.append(one.name) or run(one))
    for (case, dtype), (function, inputs) in CASES.items():
        if case == name:
            found = correctness.check(SETTING, function, inputs, correctness.LIMITS[dtype])
            assert found["ok"] and found["worst"] < correctness.LIMITS[dtype] / 2, found
    assert launched
    if name == "mLSTM of the 7B, one head":
        assert set(SEGMENTS) <= set(launched)
