"""What `allocator` claims: freed blocks are kept for the next allocation."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from functorch_mnist import allocator

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
kept = allocator.keep_freed_memory() if sys.argv[1] == "keep" else False
size = 40 << 20  # above the largest block that glibc would keep of itself


def use():
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)


use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode):
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_and_not_faulted_in_anew():
    _, before = faults("not")
    kept, after = faults("keep")
    if not kept:
        pytest.skip("the C library is not glibc")
    assert before >= 20  # pages, huge ones perhaps
    assert after < before / 10
