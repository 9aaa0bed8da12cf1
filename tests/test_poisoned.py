"""The poisoning allocator reaches what PyTorch, NumPy and C++ allocate, and nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

from . import poisoned

pytestmark = pytest.mark.skipif(poisoned.why_not() is not None, reason=str(poisoned.why_not()))

FRESH = """
import ctypes
import numpy as np
import torch

def bytes_at(address, count):
    return list((ctypes.c_uint8 * count).from_address(address))

for size in (1, 20, 5000, 3_000_000):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert torch.empty(size, dtype=dtype).isnan().all(), (size, dtype)
        assert not torch.zeros(size, dtype=dtype).any(), (size, dtype)
    assert (torch.empty(size, dtype=torch.int64) == -1).all(), size
    assert np.isnan(np.empty(size + 1000)).all(), size
    assert not np.zeros(size + 1000).any(), size

libc = ctypes.CDLL(None)
for name in ("malloc", "calloc", "realloc", "aligned_alloc", "malloc_usable_size"):
    getattr(libc, name).restype = ctypes.c_size_t
word = ctypes.c_size_t
memory = libc.malloc(word(40))
assert bytes_at(memory, 40) == [0xFF] * 40
ctypes.memset(memory, 7, 40)
grown = libc.realloc(word(memory), word(300))
assert bytes_at(grown, 300)[:40] == [7] * 40
assert set(bytes_at(grown, 300)[48:]) == {0xFF}
assert bytes_at(libc.realloc(word(0), word(24)), 24) == [0xFF] * 24
aligned = libc.aligned_alloc(word(64), word(128))
assert aligned % 64 == 0
assert bytes_at(aligned, 128) == [0xFF] * 128
assert bytes_at(libc.calloc(word(1), word(5000)), 5000) == [0] * 5000
"""

FREED = """
seen = (ctypes.c_uint8 * 4900)()  # before: anything allocated after free may land there
freed = libc.malloc(word(5000))
libc.malloc(word(64))  # so that what was freed is not handed back to the end of the heap
libc.free(word(freed))
ctypes.memmove(seen, freed + 64, 4900)
assert list(seen) == [0x5A] * 4900
assert bytes_at(libc.calloc(word(1), word(5000)), 5000) == [0] * 5000
print("poisoned")
"""


def test_fresh_memory_is_full_of_nan_and_zeros_stay_zeros():
    done = subprocess.run(
        [sys.executable, "-c", FRESH + FREED],
        env=poisoned.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout == "poisoned\n", done.stdout + done.stderr
