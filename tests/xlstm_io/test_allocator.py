"""Freed memory stays with the process: the next blocks are there without a page fault."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from xlstm_io import allocator

ROOT = Path(__file__).parents[2]
FAULTS = """if True:
    import resource, sys
    from xlstm_io.allocator import keep_freed_memory

    if sys.argv[1:]:
        keep_freed_memory()
    faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def blocks():
        held = [bytearray(b"x") * (8 << 20) for _ in range(8)]

    blocks()  # the first touch of each page is a fault in any case
    before = faults()
    for _ in range(3):
        blocks()
    print((faults() - before) / (3 * 8 * (8 << 20) / resource.getpagesize()))
"""


def faults_per_page(*words, **environment):
    command = [sys.executable, "-c", FAULTS, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries are left alone")
def test_freed_memory_is_used_again_without_page_faults():
    kept = faults_per_page("keep")
    assert kept < 0.1
    # What the environment says is kept: here to give everything back at once.
    assert faults_per_page("keep", **dict.fromkeys(allocator.SETTINGS, "65536")) > kept
