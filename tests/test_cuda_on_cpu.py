"""The host's stand-in for a GPU: it runs kernels as a GPU would, and finds their faults."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
import torch

from . import cuda_on_cpu

pytestmark = pytest.mark.skipif(
    cuda_on_cpu.why_not() is not None, reason=str(cuda_on_cpu.why_not())
)

SUCCESS, LAUNCH_FAILURE, INVALID_CONFIGURATION = 0, 719, 9
KERNELS = (
    "sub_warp_sums<4>",
    "sub_warp_sums<32>",
    "block_sums",
    "reads_unwritten_shared_memory",
    "forgets_a_barrier",
    "depends_on_the_order_of_blocks",
    "waits_for_ever",
    "returns_before_its_collective",
    "shuffles_from_outside_its_mask",
    "traps",
    "reads_past_the_end",
    "writes_past_its_shared_memory",
    "loads_misaligned",
    "around_the_cluster<true>",
    "around_the_cluster<false>",
    "writes_to_a_block_that_has_not_begun",
    "reads_a_block_that_has_ended",
    "static_variables_of_a_cluster",
    "waits_for_its_cluster_for_ever",
    "maps_what_it_does_not_have",
    "multiplies bfloat16",
    "multiplies float16",
    "multiplies tf32",
    "multiplies bfloat16, exchanged",
    "multiplies float16, exchanged",
    "multiplies tf32, exchanged",
    "multiplies_with_half_a_warp",
)
sanitized = pytest.mark.skipif(
    not cuda_on_cpu.SANITIZED, reason="needs the sanitizers: python -m tests.cuda_on_cpu"
)


@pytest.fixture(params=[1, 2, 3], ids=lambda seed: f"order{seed}")
def shim(request):
    loaded = cuda_on_cpu.load()
    loaded.set_seed(request.param)
    return loaded


def run(shim, name, blocks, threads, given, out, shared_bytes=0, cluster=0):
    return shim.selftest(KERNELS.index(name), blocks, threads, shared_bytes, given, out, cluster)


@pytest.mark.parametrize("lanes", [4, 32])
def test_shuffles_stay_within_sub_warps(shim, lanes):
    given, out = torch.randn(3 * 96, dtype=torch.float32), torch.empty(3 * 96 // lanes)
    assert run(shim, f"sub_warp_sums<{lanes}>", 3, 96, given, out) == SUCCESS
    torch.testing.assert_close(out, given.view(-1, lanes).sum(1))


def test_barriers_and_shared_memory(shim):
    given, out = torch.randn(20 * 128), torch.empty(20)
    assert run(shim, "block_sums", 20, 128, given, out, shared_bytes=512) == SUCCESS
    torch.testing.assert_close(out, given.view(20, 128).sum(1))


def test_shared_memory_starts_as_garbage(shim):
    out = torch.zeros(2)
    assert run(shim, "reads_unwritten_shared_memory", 1, 32, out, out, shared_bytes=128) == SUCCESS
    assert all(math.isnan(value) for value in out.tolist())


@pytest.mark.parametrize(("name", "terms"), [("bfloat16", 16), ("float16", 16), ("tf32", 8)])
def test_tensor_cores_multiply_what_the_lanes_hold(shim, name, terms):
    """Small integers, which are exact in every type; and an exchange of two registers is seen."""
    a, b = torch.randint(-8, 9, (16, terms)).float(), torch.randint(-8, 9, (terms, 8)).float()
    c, out = torch.randint(-8, 9, (16, 8)).float(), torch.empty(16, 8)
    given = torch.cat([matrix.flatten() for matrix in (a, b, c)])
    assert run(shim, f"multiplies {name}", 1, 32, given, out) == SUCCESS
    assert torch.equal(out, a @ b + c)
    assert run(shim, f"multiplies {name}, exchanged", 1, 32, given, out) == SUCCESS
    assert not torch.equal(out, a @ b + c)


def test_float32_is_rounded_to_tf32(shim):
    """To ten bits of the fraction, ties away from zero; what is not finite stays."""
    values = torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 2**-12, math.inf, math.nan])
    a, b = torch.zeros(16, 8), torch.zeros(8, 8)
    a[:5, 0], b[0] = values, 1.0
    given, out = torch.cat([a.flatten(), b.flatten(), torch.zeros(128)]), torch.empty(16, 8)
    assert run(shim, "multiplies tf32", 1, 32, given, out) == SUCCESS
    expected = torch.tensor([1 + 2**-10, -1 - 2**-10, 1.0, math.inf, math.nan])
    torch.testing.assert_close(out[:5, 0], expected, rtol=0, atol=0, equal_nan=True)


def results_over_orders(shim, name, blocks, threads):
    results = set()
    for _ in range(20):
        out = torch.zeros(1)
        assert run(shim, name, blocks, threads, out, out) == SUCCESS
        results.add(str(out.item()))
    return results


def test_a_missing_barrier_and_an_order_of_blocks_show(shim):
    assert len(results_over_orders(shim, "forgets_a_barrier", 1, 64)) > 1
    assert len(results_over_orders(shim, "depends_on_the_order_of_blocks", 7, 1)) > 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("waits_for_ever", "deadlock: some threads of block 0"),
        ("returns_before_its_collective", "waits for a lane that has returned|deadlock"),
        ("multiplies_with_half_a_warp", "waits for a lane that has returned|deadlock"),
        ("shuffles_from_outside_its_mask", "a shuffle reads a lane that is not in its mask"),
        ("traps", r"__trap\(\) \(block 0, 0, 0; thread 3, 0, 0\)"),
    ],
)
def test_faults_end_the_launch(shim, capfd, name, message):
    out = torch.zeros(1)
    assert run(shim, name, 1, 64, out, out) == LAUNCH_FAILURE
    assert re.search(message, capfd.readouterr().err)


def test_impossible_grids_are_refused(shim):
    out = torch.zeros(1)
    for blocks, threads, shared_bytes in ((0, 32, 0), (1, 1025, 0), (1, 32, 1 << 20)):
        code = run(shim, "traps", blocks, threads, out, out, shared_bytes)
        assert code == INVALID_CONFIGURATION


def around(shim, name, blocks=8, threads=48):
    given, out = torch.randn(blocks * threads), torch.empty(blocks * threads)
    sizes = {"shared_bytes": 8 * threads, "cluster": blocks}
    assert run(shim, name, blocks, threads, given, out, **sizes) == SUCCESS
    return given, out


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_the_blocks_of_a_cluster_share_memory(shim, blocks):
    given, out = around(shim, "around_the_cluster<true>", blocks)
    torch.testing.assert_close(out, given + blocks)


def test_a_missing_barrier_of_a_cluster_shows(shim):
    given, out = around(shim, "around_the_cluster<false>")
    assert not torch.allclose(out, given + 8)
    assert out.isnan().any()


def test_a_block_of_a_cluster_begins_with_garbage_whatever_others_wrote(shim):
    seen = set()
    for _ in range(10):
        out = torch.zeros(2)
        name = "writes_to_a_block_that_has_not_begun"
        assert run(shim, name, 2, 1, out, out, shared_bytes=16, cluster=2) == SUCCESS
        seen.add(tuple(out.isnan().tolist()))
    assert seen == {(True, False), (False, True)}


def test_a_block_of_a_cluster_has_static_variables_of_its_own(shim):
    out = torch.zeros(8)
    assert run(shim, "static_variables_of_a_cluster", 8, 32, out, out, cluster=4) == SUCCESS
    assert out.tolist() == [0, 1, 2, 3] * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reads_a_block_that_has_ended", "a block that has ended is asked for its memory"),
        ("waits_for_its_cluster_for_ever", "deadlock"),
        ("maps_what_it_does_not_have", "is not in the dynamic shared memory"),
    ],
)
def test_faults_of_a_cluster_end_the_launch(shim, capfd, name, message):
    out = torch.zeros(2)
    assert run(shim, name, 2, 32, out, out, 16, cluster=2) == LAUNCH_FAILURE
    assert re.search(message, capfd.readouterr().err)


def test_impossible_clusters_are_refused(shim):
    out = torch.zeros(16)
    for blocks, cluster in ((3, 2), (16, 16)):
        code = run(shim, "static_variables_of_a_cluster", blocks, 32, out, out, cluster=cluster)
        assert code == INVALID_CONFIGURATION


def test_launches_are_counted(shim):
    shim.reset_counts()
    out = torch.zeros(1)
    run(shim, "depends_on_the_order_of_blocks", 1, 1, out, out)
    run(shim, "depends_on_the_order_of_blocks", 9, 1, out, out)
    assert shim.counts() == cuda_on_cpu.Counts(kernels=2, memsets=0)


FAULTS = {
    "reads_past_the_end": "heap-buffer-overflow",
    "writes_past_its_shared_memory": "heap-buffer-overflow",
    "loads_misaligned": "misaligned address",
}


@sanitized
@pytest.mark.parametrize("name", FAULTS)
def test_sanitizers_see_what_a_kernel_does_to_a_tensor(name):
    """In a process of its own, which the sanitizer ends."""

    script = f"""
import torch
from tests import cuda_on_cpu
given, out = torch.zeros(64), torch.zeros(64)
shim = cuda_on_cpu.load()
print("started", flush=True)
shim.selftest({KERNELS.index(name)}, 1, 64, 256, given, out, 0)
print("not seen")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "started\n"
    assert FAULTS[name] in done.stderr
