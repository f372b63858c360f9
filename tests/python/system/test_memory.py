"""Freed memory goes back to the system."""

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource
from bpo.system import memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

blocks = [libc.malloc(60_000) for _ in range(4000)]
for block in blocks:
    ctypes.memset(block, 1, 60_000)
# Every hundredth stays, so that nothing is free at the end of the heap.
for index, block in enumerate(blocks):
    if index % 100 != 99:
        libc.free(block)
full = resident()
trim = memory.HeapTrimmer()
trim()
assert resident() > full - 20_000_000, "too early"
memory._SECONDS_BETWEEN = 0
trim()
assert resident() < full - 200_000_000, (full, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_memory_in_pieces_is_given_back_after_a_while():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
