"""What is compiled for the archive, and what the first part of the proof launches.

Multiples of 16 among lengths, boundaries and strides make other kernels of the same code.
`test_gpu_pack.py` runs this in a process of its own: the device that does not exist must be made
before the first backward pass.
"""

import sys
from pathlib import Path
from unittest import mock

from benchmarks.compiled import aot
from benchmarks.counting.recorded_launches import LaunchRecorder, facts_of
from benchmarks.gpu_proof import correctness, pack
from benchmarks.gpu_proof.launches import Rehearsed
from pretrain.rehearsal.device import as_rank


def main() -> int:
    """1 where the archive lacks a kernel, or has one twice."""
    packed = []
    with mock.patch.object(aot, "compile_variant", lambda one, target: packed.append(one)):
        names = pack.compile_kernels(Path("unused"), dry=False)
    facts = set(map(facts_of, packed))
    print(f"{len(packed)} are packed, {len(facts)} of them different")
    recorder, real = LaunchRecorder(), Rehearsed(Path("unused"), False)
    with as_rank(0, 1, recorder), recorder:
        for name, _, function, inputs in correctness.cases(real):
            if "7B" in name or "SwiGLU" in name:
                correctness.differentiate(function, real.backend, inputs)
    lacking = [one.name for key, one in recorder.variants.items() if key not in facts]
    print(f"of {len(recorder.variants)} launches the archive lacks {lacking}")
    sound = len(set(names)) == len(facts) == len(packed) and len(recorder.variants) > 20
    return int(not sound or bool(lacking))


if __name__ == "__main__":
    sys.exit(main())
