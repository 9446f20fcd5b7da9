"""Which Triton kernels a run launches, and which ones its check does: as Triton compiles them.

Both run on tensors without data. `test_kernel_check.py` runs this in a process of its own: the
device that does not exist must be made before the first backward pass.
"""

import sys
from pathlib import Path

from benchmarks.counting.recorded_launches import LaunchRecorder
from benchmarks.kernel_variants.variant import Variant
from pretrain import layout as layouts
from pretrain.config import RunConfig, load_config
from pretrain.rehearsal.device import as_rank

RUN_FILES = Path(__file__).parents[3] / "pretrain" / "configs"
RAGGED = {"data.seq_len": 1000, "data.micro_batch": 2, "layout.tensor": 8}
CASES = [
    ("xlstm_7b", "MM", {}),
    ("xlstm_7b", "M", RAGGED),
    ("xlstm_7b", "M", {"layout.context": 2}),
    ("xlstm_1.3b_7to1", "ms", {}),
    ("xlstm_125m_7to1", "ms", {"layout.tensor": 2, "layout.context": 2, "data.seq_len": 512}),
    ("xlstm_350m_7to1", "s", {"memory.slstm_form": "persistent", "data.seq_len": 256}),
    ("xlstm_large_2.7b", "M", {}),
    ("mamba2_125m", "d", {}),
]


def binary(variant: Variant) -> tuple:
    """What Triton compiles a launch by: types, constants, multiples of 16, warps and stages.

    Whether a stride is a multiple of 16 is left out: it depends on what lies beside a tensor.
    """
    facts = {name: variant.constexprs.get(name, kind) for name, kind in variant.signature.items()}
    aligned = tuple(name for name in variant.aligned() if not name.startswith("stride"))
    return variant.fn.__name__, *facts.items(), aligned, variant.num_warps, variant.num_stages


def of_training(config: RunConfig) -> set[tuple]:
    """Binaries of one micro-batch, forward and backward, and of a look into the cells."""
    recorder = LaunchRecorder()
    layout = config.layout
    with as_rank(0, layout.tensor * layout.context, recorder):
        place = layouts.start(config)
        try:
            with recorder:
                recorder.train(config, place)
        finally:
            place.close()
    return set(map(binary, recorder.variants.values()))


def of_check(config: RunConfig) -> set[tuple]:
    """Binaries of the comparison before the run."""
    recorder = LaunchRecorder()
    with as_rank(0, 1, recorder), recorder:
        recorder.check(config)
    return set(map(binary, recorder.variants.values()))


def main() -> int:
    """Compare both for every case; 1 where the check leaves out a kernel of the step."""
    lacking = 0
    for name, pattern, changes in CASES:
        keys = {"run.dir": "unused", "data.path": "unused", "model.pattern": pattern}
        run = load_config(RUN_FILES / f"{name}.yaml", keys | changes, quiet=True)
        trained, checked = of_training(run), of_check(run)
        assert trained, name
        for one in sorted(trained - checked, key=str):
            print(f"{name} {changes}: the check leaves out {one}")
            lacking += 1
    print(f"{len(CASES)} runs, {lacking} kernels that the check leaves out")
    return int(lacking > 0)


if __name__ == "__main__":
    sys.exit(main())
