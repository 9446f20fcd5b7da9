"""What a rehearsal counts, and a plan with it, is what the storages of a real run take."""

import json
import subprocess
from pathlib import Path

import pytest

from pretrain.rehearsal.memory import LASTING
from tests.pretrain.rehearsal import live_memory

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def counted(warm_python):
    command = [warm_python.executable, "-m", "tests.pretrain.rehearsal.live_memory"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("layout", live_memory.LAYOUTS)
@pytest.mark.parametrize("size", live_memory.SIZES)
def test_memory_is_what_live_storages_take(pool, counted, size, layout):
    ranks, _ = live_memory.LAYOUTS[layout]
    real, found = pool(ranks, live_memory.live, size, layout)[0], counted[layout][size]
    assert {kind: found[kind] for kind in LASTING} == {kind: real[kind] for kind in LASTING}
    assert all(real.values()), "each of them takes something"
    assert found[live_memory.ACTIVATIONS] == pytest.approx(real[live_memory.ACTIVATIONS], rel=0.03)
