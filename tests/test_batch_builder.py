"""The compiled builder and its NumPy implementation: threads, memory, and which is in use."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import psutil
import pytest

from ehrseq_fast import backend as backends
from ehrseq_fast.batch import PackedVisits
from ehrseq_fast.batch.builder import batch_builder

from .batch_cases import (
    REFERENCE,
    assert_holds,
    assert_same,
    flat,
    not_compiled,
)


@pytest.mark.skipif(not_compiled() is not None, reason=f"no compiled builder: {not_compiled()}")
def test_the_interpreter_runs_on_while_a_batch_is_built():
    n_patients, n_visits = 20_000, 1_000_000
    arrays = (
        np.random.default_rng(0).integers(0, 5000, 4 * n_visits, np.int32),
        np.arange(0, 4 * n_visits + 1, 4),
        np.arange(0, n_visits + 1, n_visits // n_patients),
    )
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        start = time.perf_counter()
        batch_builder().pack_flat(*arrays, None, 5000, None, None, None, False)
        end = time.perf_counter()
    finally:
        done.set()
        thread.join()
    third = (end - start) / 3
    assert [t for t in ticks if start + third < t < end - third], "the lock was held throughout"


def test_two_threads_build_what_one_builds(builder):
    patients = [[[p % 13, v % 13] for v in range(1 + p % 9)] for p in range(200)]
    arrays = flat(patients)
    expected = [PackedVisits.from_flat(*arrays, range(k, 200, 2)) for k in range(2)]
    built: dict[int, list[PackedVisits]] = {0: [], 1: []}

    def build(k):
        for _ in range(20):
            built[k].append(PackedVisits.from_flat(*arrays, range(k, 200, 2)))

    threads = [threading.Thread(target=build, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        assert len(built[k]) == 20
        for batch in built[k]:
            assert_same(batch, expected[k])


def test_memory_mapped_arrays_are_neither_copied_nor_read_through(builder, tmp_path):
    n_codes = 50_000_000  # 200 MB on paper, and next to nothing on a disk that knows holes
    codes = np.memmap(tmp_path / "codes", np.int32, "w+", shape=(n_codes,))
    codes[-6:] = [1, 2, 3, 4, 5, 6]
    codes.flush()
    codes = np.memmap(tmp_path / "codes", np.int32, "r", shape=(n_codes,))
    visit_offsets = np.array([0, n_codes - 6, n_codes - 3, n_codes])
    patient_offsets = np.array([0, 1, 3])
    resident = psutil.Process().memory_info().rss
    tracemalloc.start()
    try:
        batch = PackedVisits.from_flat(codes, visit_offsets, patient_offsets, [1])
        allocated = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_holds(batch, [[[1, 2, 3], [4, 5, 6]]])
    assert allocated < 5e6
    assert psutil.Process().memory_info().rss - resident < 50e6


def test_the_builder_is_chosen_visibly():
    with backends.use_backend(REFERENCE):
        assert batch_builder().__name__ == "ehrseq_fast.batch.reference"
    name = batch_builder().__name__
    assert name == ("ehrseq_fast.batch.reference" if not_compiled() else "ehrseq_fast._batching")


def test_without_compiled_parts_the_twin_builds():
    program = (
        "from ehrseq_fast import backend; from ehrseq_fast.batch import PackedVisits\n"
        "print(backend.compiled_batching.reason, PackedVisits.from_lists([[[1]]]).codes.tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "EHRSEQ_FAST_NO_COMPILED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "EHRSEQ_FAST_NO_COMPILED is set [1]\n"
