"""No operation mixes devices, which would fail on a GPU and pass on a CPU."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_layers_and_kernels_stay_on_their_device(warm_python):
    done = subprocess.run(
        [warm_python.executable, "-m", "tests.xlstm_mcore.accelerator"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "16 cases passed, 0 failed" in done.stdout
    # The layers `M` and `m` have no operator that the capture of a CUDA graph does not allow.
    assert "8 captures as expected" in done.stdout
