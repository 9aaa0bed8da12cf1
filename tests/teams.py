"""Whose threads run the compiled CPU kernels' loops (``csrc/common/parallel.cpp``), for tests."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from ehrseq_fast import backend

TEAMS = {"any": 0, "torch": 1, "helpers": 2, "late": 3}


def library() -> ctypes.CDLL:
    path = backend.compiled_cpu.path
    assert path is not None
    loaded = ctypes.CDLL(path)
    loaded.ehrseq_fast_most_shares.restype = ctypes.c_int64
    return loaded


@contextlib.contextmanager
def team(name: str) -> Iterator[None]:
    """In the block loops are run by torch's threads, by this package's own, as where torch's come
    late, or by any."""
    chosen = library().ehrseq_fast_choose_team
    chosen(TEAMS[name])
    try:
        yield
    finally:
        chosen(TEAMS["any"])


def most_shares() -> int:
    """Among how many threads the most divided loop since the last call was shared out."""
    return library().ehrseq_fast_most_shares()
