"""Whole models in environments that are not the tests': restricted and many threads, forked and
spawned processes, Python threads, PyTorch's global modes, copies. Every fused model gives the bits
that it gives elsewhere; the three paths agree."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from ehrseq_fast import (
    PackedGRU,
    PackedLSTM,
    PackedRows,
    PackedVisits,
    backend,
    next_codes_bce,
    openmp,
    use_backend,
)

from . import environments as env

pytestmark = pytest.mark.usefixtures("compiled")

# environment variables, and the checks that run in one process with them
RESTRICTED = ("refused_paths", "refused_bfloat16", "plain_paths")
PROCESSES = {
    "as it comes": (
        {"OMP_NUM_THREADS": "2"},
        ("plain", "threads", "ten_threads", "forked", "spawned"),
    ),
    "OMP_THREAD_LIMIT=1": (
        {"OMP_NUM_THREADS": "4", "OMP_THREAD_LIMIT": "1"},
        ("plain", *RESTRICTED),
    ),
    "OMP_THREAD_LIMIT=2": ({"OMP_NUM_THREADS": "4", "OMP_THREAD_LIMIT": "2"}, ("plain",)),
    "OMP_DYNAMIC": ({"OMP_NUM_THREADS": "4", "OMP_DYNAMIC": "true"}, ("plain", *RESTRICTED)),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every process computed, two at a time."""
    reason = backend.why_not_loaded("cpu")
    if reason is not None:
        pytest.skip(f"no compiled kernels: {reason}")
    folder = tmp_path_factory.mktemp("environments")
    found, waiting, running = {}, list(PROCESSES.items()), []
    while waiting or running:
        while waiting and len(running) < 2:
            name, (variables, checks) = waiting.pop(0)
            file = folder / f"{len(found) + len(running)}-{len(waiting)}.pt"
            command = [sys.executable, "-m", "tests.environments", str(file), *checks]
            cleared = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
            process = subprocess.Popen(command, env=cleared | variables, stderr=subprocess.PIPE)
            running.append((name, file, process))
        name, file, process = running.pop(0)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, f"{name}: {said.decode()[-3000:]}"
        found[name] = torch.load(file)
    return found


def refuse_different(actual, expected):
    different = [
        f"{name}: {float((actual[name].double() - value.double()).abs().max()):.1e}"
        for name, value in expected.items()
        if not torch.equal(actual[name], value)
    ]
    assert not different, different


@pytest.mark.parametrize("name", [name for name in PROCESSES if name != "as it comes"])
def test_the_same_bits_however_openmp_is_restricted(found, name):
    refuse_different(found[name]["plain"], found["as it comes"]["threads"]["1 threads"])


@pytest.mark.parametrize("path", ["packed", "padded"])
@pytest.mark.parametrize("name", ["OMP_THREAD_LIMIT=1", "OMP_DYNAMIC"])
def test_pytorchs_lstm_is_refused_where_openmp_is_restricted(found, name, path):
    """oneDNN's is wrong there."""
    with_onednn, without = found[name]["refused_paths"][path]
    assert "gives wrong numbers where OMP_" in with_onednn
    assert without == ""


@pytest.mark.parametrize("name", ["OMP_THREAD_LIMIT=1", "OMP_DYNAMIC"])
def test_pytorchs_products_of_bfloat16_are_refused_where_openmp_is_restricted(found, name):
    said = found[name]["refused_bfloat16"]
    assert said.pop("fused") == ""
    assert [what for what, error in said.items() if "wrong numbers where OMP_" not in error] == []


@pytest.mark.parametrize(
    ("setting", "value", "variable"),
    [("dynamic", 1, "OMP_DYNAMIC=true"), ("max_active_levels", 0, "OMP_MAX_ACTIVE_LEVELS=0")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_openmp_restricted_while_the_program_runs(setting, value, variable, dtype):
    runtime = openmp._runtime()
    if runtime is None:
        pytest.skip("PyTorch's OpenMP cannot be asked here")
    layer = PackedLSTM(2, 3) if dtype == torch.float32 else PackedGRU(2, 3)
    x, layer = torch.ones(4, 2, 2, dtype=dtype), layer.to(dtype)
    threads, before = torch.get_num_threads(), getattr(runtime, f"omp_get_{setting}")()
    torch.set_num_threads(2)
    layer(x)
    getattr(runtime, f"omp_set_{setting}")(value)
    try:
        with pytest.raises(RuntimeError, match=f"wrong numbers where {variable} lets"):
            layer(x)
        torch.set_num_threads(1)
        layer(x)
    finally:
        getattr(runtime, f"omp_set_{setting}")(before)
        torch.set_num_threads(threads)


def test_products_of_float32_that_onednn_computes_in_bfloat16():
    """``torch.set_float32_matmul_precision("medium")``."""
    runtime = openmp._runtime()
    if runtime is None:
        pytest.skip("PyTorch's OpenMP cannot be asked here")
    torch.manual_seed(0)
    layer, x = PackedGRU(40, 40), torch.randn(30, 2, 40)
    few = pack_sequence([torch.randn(1, 40) for _ in range(4)])
    hx, head = torch.randn(1, 4, 40), torch.randn(300, 40)
    states = PackedRows(torch.randn(4, 40), PackedVisits.from_lists([[[1]]] * 4))
    expected = layer(few, hx)[1], next_codes_bce(states, head, next_visit=False)
    threads, levels = torch.get_num_threads(), runtime.omp_get_max_active_levels()
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("medium")
    try:
        layer(x)
        runtime.omp_set_max_active_levels(0)
        with pytest.raises(RuntimeError, match="products of float32 give wrong numbers"):
            layer(x)
        with use_backend("reference"), pytest.raises(RuntimeError, match="float32 give wrong"):
            next_codes_bce(states, head, next_visit=False)
        actual = layer(few, hx)[1], next_codes_bce(states, head, next_visit=False)
        torch.testing.assert_close(actual, expected)
    finally:
        runtime.omp_set_max_active_levels(levels)
        torch.set_float32_matmul_precision("highest")
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", ["packed", "padded"])
@pytest.mark.parametrize("name", ["OMP_THREAD_LIMIT=1", "OMP_DYNAMIC"])
def test_the_paths_agree_however_openmp_is_restricted(found, name, path):
    fused = found["as it comes"]["threads"]["1 threads"]
    for entry, value in found[name]["plain_paths"][path].items():
        torch.testing.assert_close(value, fused[entry], rtol=1e-3, atol=2e-5, msg=entry)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_same_bits_for_any_number_of_threads(found, count):
    of_threads = found["as it comes"]["threads"]
    refuse_different(of_threads[f"{count} threads"], of_threads["1 threads"])


def test_the_same_bits_in_ten_python_threads_at_once(found):
    expected = env.step("survival")
    of_threads = found["as it comes"]["ten_threads"]
    assert len(of_threads) == 10
    for result in of_threads.values():
        refuse_different(result, expected)


@pytest.mark.parametrize("how", ["forked", "spawned"])
def test_the_same_bits_in_a_process_of_its_own(found, how):
    refuse_different(found["as it comes"][how], env.step("survival"))


@pytest.fixture(scope="module")
def batch():
    return env.make_batch()


@pytest.mark.parametrize("name", env.NAMES)
def test_the_three_paths_agree(batch, name):
    paths = ["fused", "packed"] + ["padded"] * ("directions" not in name)
    fused, *others = (env.step(name, path, batch) for path in paths)
    for other in others:
        for entry, value in fused.items():
            torch.testing.assert_close(value, other[entry], rtol=1e-3, atol=2e-5, msg=entry)


# PyTorch's global modes, in this process ------------------------------------------------------


@pytest.fixture
def expected(batch):
    return env.step("survival", "fused", batch)


def test_default_dtype(batch, expected):
    model = env.make("survival")
    torch.set_default_dtype(torch.float64)
    try:
        model.loss(env.without_features(batch)).backward()
    finally:
        torch.set_default_dtype(torch.float32)
    refuse_different(
        {f"survival: {k}": p.grad for k, p in model.named_parameters()},
        {k: v for k, v in expected.items() if k != "survival: loss"},
    )


@pytest.mark.parametrize("name", env.NAMES)
@pytest.mark.parametrize("path", ["fused", "packed", "padded"])
def test_default_device(batch, name, path):
    """Nothing that is computed on the CPU may be made where new tensors are made by default."""
    model, packed = env.make(name, path), batch
    if name != "with time":
        packed = env.without_features(batch)
    codes = packed.to_padded()
    torch.set_default_device("meta")
    try:
        loss = model.loss(packed)
        loss.backward()
        model(*codes)
        built = PackedVisits.from_padded(*codes)
        rebuilt = PackedVisits.from_lists([[[1], [2]]], event_times=[0], event_indicators=[1])
        assert built.device.type == rebuilt.device.type == loss.device.type == "cpu"
        rebuilt[[0]].to_padded()
    finally:
        torch.set_default_device(None)
    assert all(p.grad.device.type == "cpu" for p in model.parameters())


def test_inference_mode_then_training(expected):
    fresh = env.without_features(env.make_batch())
    model = env.make("survival")
    with torch.inference_mode():
        model(fresh)
        model.predict_survival(fresh)
        fresh.to_padded()
        made = env.without_features(env.make_batch())
        model.loss(made)
    for packed in (fresh, made):
        refuse_different(env.step("survival", "fused", packed), expected)


@pytest.mark.parametrize("name", env.NAMES)
def test_anomaly_mode_and_deterministic_algorithms(batch, name):
    before = env.step(name, "fused", batch)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_detect_anomaly(True):
            refuse_different(env.step(name, "fused", batch), before)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("name", env.NAMES)
def test_copies(batch, name, copied):
    model = env.make(name)
    packed = batch if name == "with time" else env.without_features(batch)
    model.loss(packed).backward()
    other, other_batch = copied(model), copied(packed)
    other.zero_grad()
    other.loss(other_batch).backward()
    refuse_different(
        {k: p.grad for k, p in other.named_parameters()},
        {k: p.grad for k, p in model.named_parameters()},
    )
