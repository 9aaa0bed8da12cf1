"""What only a GPU can show of its kernels: streams, graphs, launches, offsets past 2^31, the same
bits on every run. Skipped without one, but for the cases themselves, which are run on the host.

``pytest -m gpu`` runs these and the GPU's part of every backend-parametrised test.
"""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from ehrseq_fast import (
    PackedVisits,
    discrete_time_survival_nll,
    masked_pool,
    packed_survival_nll,
    packed_visit_pool,
    use_backend,
    visit_mean_pool,
)
from ehrseq_fast import backend as backends

from .conftest import RUNNABLE
from .gpu_cases import (
    CASES,
    DTYPES,
    PATIENTS,
    VISITS,
    WIDTH,
    Step,
    assert_agrees,
    equal,
    hazards_of_shape,
    make_batch,
    normal,
    provoke_errors,
)

GIB = 2**30


@pytest.mark.parametrize("host", RUNNABLE)
@pytest.mark.parametrize("name", CASES)
def test_the_cases_on_the_host(name, host):
    with use_backend(host):
        for dtype in DTYPES:
            step = Step(name, "cpu", dtype)
            assert_agrees(name, step)
        first = step()
        step.fill(float("nan"))
        assert not equal(first, step())
        step.fill(step.values)
        provoke_errors(step)
        assert equal(first, step())


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda")])
def on_gpu(request):
    """A GPU's backend, asked for."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = backends.why_not_loaded(request.param)
    if reason is not None:
        pytest.skip(f"{request.param} is not loaded: {reason}")
    if backends.kernels(request.param).device != "cuda":
        pytest.skip(f"{request.param} is emulated on the host here")
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=CASES)
def name(request, on_gpu):
    """A case whose operation has kernels of that backend."""
    _skip_without_kernels(on_gpu, CASES[request.param][0])
    return request.param


def _skip_without_kernels(backend: str, operation: str) -> None:
    reason = backends.why_not(operation, backend, "cuda", torch.float32)
    if reason is not None:
        pytest.skip(f"{backend} cannot run {operation}: {reason}")


def _need_memory(gibibytes: int) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gibibytes * GIB:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory, {free / GIB:.1f} are free")


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(name, dtype):
    assert_agrees(name, Step(name, "cuda", dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_runs_give_the_same_bits(name, dtype):
    step = Step(name, "cuda", dtype)
    first = step()
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        for result, expected in zip(step(), first, strict=True):
            differing += (result != expected).any()
    assert differing.item() == 0


def test_cuda_graph_reads_its_inputs_anew(name):
    step = Step(name, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for scale in (1.0, 0.5, 0.25):
        step.fill(float("nan"))
        graph.replay()
        for result in captured:
            result.fill_(float("nan"))
        step.fill(step.values * scale)
        graph.replay()
        replayed = tuple(result.clone() for result in captured)
        assert equal(replayed, step())  # an eager call between replays takes nothing from them
    for result in captured:
        result.fill_(float("nan"))
    graph.replay()
    assert equal(captured, replayed)


FIRST_CALL = """
import torch
from tests.gpu_cases import Step, equal
from ehrseq_fast import use_backend

with use_backend("reference"):
    step = Step({name!r}, "cuda")
    step()
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with use_backend("cuda"):
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert equal(captured, step())
"""


@functools.cache
def first_calls() -> dict[str, subprocess.CompletedProcess[str]]:
    """One process for each case, several at a time: most of what they take is their start."""

    def started(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", FIRST_CALL.format(name=name)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(min(6, os.cpu_count() or 1)) as pool:
        return dict(zip(CASES, pool.map(started, CASES), strict=True))


def test_the_first_call_of_a_process_may_be_captured(name, on_gpu):
    """That is when CUDA loads the library's kernels."""
    if on_gpu != "cuda":
        pytest.skip("Triton compiles on its first call, which cannot be captured")
    done = first_calls()[name]
    assert done.returncode == 0, done.stderr


def test_graphs_on_other_streams_beside_eager_calls(name):
    """Two replays and eager calls at once: nothing that they write is shared."""
    steps = [Step(name, "cuda") for _ in range(3)]
    expected = steps[0]()
    graphs, results = [], []
    for step in steps[:2]:
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(step())
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = steps[2]()
    torch.cuda.synchronize()
    for result in (*results, eager):
        assert equal(result, expected)


def test_a_side_stream_is_where_it_runs(name):
    """Its inputs come late on that stream; a kernel on another one would read NaN."""
    step = Step(name, "cuda")
    expected = step()
    step.fill(float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # cycles: about 0.1 s
        step.fill(step.values)
        results = step()
    side.synchronize()
    assert equal(results, expected)


def test_many_streams_at_once(name):
    steps = [Step(name, "cuda") for _ in range(4)]
    expected = steps[0]()
    streams = [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for step, stream in zip(steps, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(step())
    torch.cuda.synchronize()
    assert all(equal(result, expected) for result in results)


def test_a_call_after_an_error(name):
    step = Step(name, "cuda")
    expected = step()
    provoke_errors(step)
    assert equal(step(), expected)


def test_tensors_on_other_devices_are_refused(on_gpu):
    """Also where nothing checks them but the operators: a kernel would follow the host's address,
    and no later call would work."""
    if on_gpu != "cuda":
        pytest.skip("Triton itself refuses tensors of the host")
    operators = backends.operators("cuda")
    weight, hazards = torch.eye(8, device="cuda"), torch.full((2, 3), 0.5, device="cuda")
    codes, times = torch.tensor([[1, 2]]), torch.tensor([1, 2])
    packed = PackedVisits.from_lists([[[1, 2]]])
    loss = (None, None, None, 0, False, 1e-7, 1, True)
    for call in (
        lambda: operators.visit_pool(codes, weight, None, 0),
        lambda: operators.visit_pool(codes.cuda(), weight, codes != 0, 0),
        lambda: operators.packed_visit_pool(packed.codes, packed.code_offsets, weight, 0),
        lambda: operators.survival_nll(hazards, times, times.cuda(), *loss),
    ):
        with pytest.raises(ValueError, match="all tensors of a call on one device"):
            call()
    torch.cuda.synchronize()


def test_values_are_refused_when_asked_to_check(on_gpu):
    _skip_without_kernels(on_gpu, "packed_survival_nll")
    batch = make_batch("cuda")
    late = torch.full((PATIENTS,), VISITS, device="cuda")
    hazards = torch.full((batch.n_visits,), 0.5, device="cuda")
    with pytest.raises(ValueError, match="event_times must be one of the patient's visits"):
        packed_survival_nll(hazards, batch, event_times=late, validate=True)
    # unchecked, it reads nothing out of bounds
    assert packed_survival_nll(hazards, batch, event_times=late).isfinite()


def test_no_call_waits_for_the_gpu(name):
    step = Step(name, "cuda")
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [step() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert equal(results[0], results[-1])


def kernels_of(call: Callable[[], object]) -> list[str]:
    """What the GPU ran during ``call``, copies and fills included."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return [event.name for event in profiler.events() if event.device_type == on_device]


def test_counting_kernels_counts_none_on_the_host():
    assert kernels_of(lambda: torch.ones(3) + 1) == []


def test_launches_per_call(name):
    x = torch.ones(3, device="cuda")
    kernels_of(lambda: x + 1)  # the profiler misses the first it sees
    if len(kernels_of(lambda: x + 1)) != 1:
        pytest.skip("the profiler sees no kernels here")
    step = Step(name, "cuda")
    step()
    _, _, forward, backward = CASES[name]
    values = []
    launched = kernels_of(lambda: values.append(step.forward()))
    if forward is not None:
        assert len(launched) == forward, launched
    if backward is not None:
        launched = kernels_of(lambda: step.backward(values[0]))
        assert len(launched) <= backward, launched


def test_autocast(name):
    """Hazards and tables come in the dtype that they have; sums stay in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        step = Step(name, "cuda")
        expected = step()
        with torch.autocast("cuda", dtype):
            results = step()
        assert [result.dtype for result in results] == [result.dtype for result in expected]
        assert equal(results, expected)


def test_a_head_under_autocast(on_gpu):
    _skip_without_kernels(on_gpu, "packed_survival_nll")
    batch = make_batch("cuda")
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 1, device="cuda")
    states = torch.randn(batch.n_visits, 16, device="cuda")

    def step() -> tuple[Tensor, ...]:
        with torch.autocast("cuda", torch.bfloat16):
            logits = head(states)[:, 0]
            loss = packed_survival_nll(logits, batch, from_logits=True)
        assert logits.dtype == torch.bfloat16
        assert loss.dtype == torch.float32
        return loss.detach(), *torch.autograd.grad(loss, tuple(head.parameters()))

    results = step()
    with use_backend("reference"):
        expected = step()
    torch.testing.assert_close(results, expected, rtol=2e-2, atol=1e-3)


def test_compiled_whole_with_dynamic_shapes(on_gpu):
    _skip_without_kernels(on_gpu, "visit_pool")
    _skip_without_kernels(on_gpu, "survival_nll")

    def step(codes, mask, weight, times, seen, visits):
        vectors = visit_mean_pool(codes, weight, mask)
        return discrete_time_survival_nll(vectors.sum(-1).sigmoid(), times, seen, visits)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    weight = (normal(50, 16) * 0.1).float().to("cuda").requires_grad_()
    for patients, visits, codes in ((5, 7, 3), (9, 12, 6), (33, 20, 2)):
        ids = torch.arange(patients * visits * codes, device="cuda") % 50
        ids = ids.reshape(patients, visits, codes)
        times = torch.arange(patients, device="cuda") % visits
        args = ids, ids != 0, weight, times, times % 2, torch.ones(patients, visits, device="cuda")
        results = []
        for call in (compiled, step):
            value = call(*args)
            results.append((value.detach(), *torch.autograd.grad(value, weight)))
        torch.testing.assert_close(*results)


def test_compiled_into_cuda_graphs(on_gpu):
    """Inductor's CUDA graphs refuse memory that a call allocates and keeps: run in a new stream's
    first call, so that a workspace has to be made there."""
    _skip_without_kernels(on_gpu, "survival_nll")
    torch._dynamo.reset()
    step = Step("loss", "cuda")
    compiled = torch.compile(step.run, fullgraph=True, mode="reduce-overhead")
    expected = step()
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        value = compiled(step.leaf)
        (grad,) = torch.autograd.grad(value, step.leaf, step.incoming)
        torch.testing.assert_close((value.detach(), grad), expected)


def test_every_device(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    expected = tuple(result.cpu() for result in Step(name, "cuda:0")())
    assert torch.cuda.current_device() == 0
    for index in range(1, torch.cuda.device_count()):
        results = Step(name, f"cuda:{index}")()  # while another device is the current one
        assert all(result.device.index == index for result in results)
        assert equal(tuple(result.cpu() for result in results), expected)


def test_loss_of_more_than_2_to_the_31_hazards(on_gpu):
    _skip_without_kernels(on_gpu, "survival_nll")
    _need_memory(40)
    slots, tail = 256, 9
    patients = 2**31 // slots + tail
    hazards = torch.full((patients, slots), 0.5, dtype=torch.bfloat16, device="cuda")
    hazards[-tail:] = hazards_of_shape(tail, slots).to("cuda")
    times = torch.full((patients,), slots - 1, device="cuda")
    seen = torch.arange(patients, device="cuda") % 2

    def step(rows: slice) -> tuple[Tensor, Tensor]:
        leaf = hazards[rows].requires_grad_()
        nll = discrete_time_survival_nll(leaf, times[rows], seen[rows], reduction="none")
        (grad,) = torch.autograd.grad(nll, leaf, torch.ones((), device="cuda").expand(len(nll)))
        return nll.detach()[-tail:].clone(), grad[-tail:].clone()

    whole, alone = step(slice(None)), step(slice(-tail, None))
    torch.testing.assert_close(whole, alone)
    assert alone[1][:, :-1].ne(0).all()


@pytest.mark.parametrize("layout", ["visit_pool", "packed_visit_pool"])
def test_a_table_of_more_than_2_to_the_31_values(on_gpu, layout):
    _skip_without_kernels(on_gpu, layout)
    _need_memory(40)
    tail = 50
    vocabulary = 2**31 // WIDTH + tail
    weight = torch.zeros(vocabulary, WIDTH, dtype=torch.bfloat16, device="cuda")
    weight[-tail:] = normal(tail, WIDTH).to("cuda")
    visits = [[[1 + (p * 7 + t) % (tail - 1), 1] for t in range(1 + p % 5)] for p in range(40)]

    def step(first: int) -> tuple[Tensor, Tensor]:
        moved = [[[code + first for code in visit] for visit in patient] for patient in visits]
        batch = PackedVisits.from_lists(moved)
        leaf = weight[vocabulary - tail - first :].requires_grad_()
        if layout == "visit_pool":
            codes, mask, _ = batch.to_padded()
            pooled = visit_mean_pool(codes.to("cuda"), leaf, mask.to("cuda"))
        else:
            pooled = packed_visit_pool(batch.to("cuda"), leaf)
        (grad,) = torch.autograd.grad(pooled.float().square().sum(), leaf)
        assert grad[:1000].isfinite().all()
        return pooled.detach(), grad[-tail:].clone()

    torch.testing.assert_close(step(vocabulary - tail), step(0))


def test_masked_pool_of_more_than_2_to_the_31_values(on_gpu):
    _skip_without_kernels(on_gpu, "masked_pool")
    _need_memory(40)
    tail = 11
    rows = 2**31 // (16 * WIDTH) + tail
    embeddings = torch.zeros(rows, 16, WIDTH, dtype=torch.bfloat16, device="cuda")
    embeddings[-tail:] = normal(tail, 16, WIDTH).to("cuda")
    mask = torch.ones(rows, 16, dtype=torch.bool, device="cuda")

    def step(part: slice) -> tuple[Tensor, Tensor]:
        leaf = embeddings[part].requires_grad_()
        pooled = masked_pool(leaf, mask[part])
        incoming = torch.ones((), dtype=pooled.dtype, device="cuda").expand_as(pooled)
        (grad,) = torch.autograd.grad(pooled, leaf, incoming)
        return pooled.detach()[-tail:].clone(), grad[-tail:].clone()

    torch.testing.assert_close(step(slice(None)), step(slice(-tail, None)))
