"""Freed memory stays with the process, for any thread: the next blocks need no page faults."""

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

HEAPS = """if True:
    import ctypes, sys, threading
    from xlstm_io.allocator import keep_freed_memory

    if sys.argv[1:]:
        keep_freed_memory()
    held = threading.Barrier(5)

    def hold():
        block = bytearray(100_000)
        held.wait()

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    held.wait()
    libc = ctypes.CDLL(None)
    libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
    libc.fflush(None)
"""


def output_of(program, *words, **environment):
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other libraries are left alone"
)


def faults_per_page(*words, **environment):
    return float(output_of(FAULTS, *words, **environment))


@glibc
def test_freed_memory_is_used_again_without_page_faults():
    kept = faults_per_page("keep")
    assert kept < 0.1
    # What the environment says is kept: here to give everything back at once.
    assert faults_per_page("keep", **dict.fromkeys(allocator.SETTINGS, "65536")) > kept


@glibc
def test_what_a_thread_frees_serves_all_threads():
    assert output_of(HEAPS, "keep").count("<heap nr=") == 1
    assert output_of(HEAPS).count("<heap nr=") > 1
