"""Fixtures that all operations share: the backends that can run here, and seeds; and what the mark
``operation`` may name."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("hypothesis") is None:
    from . import without_hypothesis

    without_hypothesis.stand_in()

from hypothesis import settings

if not torch.cuda.is_available() and not os.environ.get("EHRSEQ_FAST_NO_COMPILED"):
    # Triton's kernels then run in its interpreter; it asks when they are decorated. They are the
    # same with and without compiled kernels, and so is what they compute.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from ehrseq_fast import backend as backends
from ehrseq_fast import operations

from . import cuda_on_cpu, interpreter

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    interpreter.replace_once()

# Property tests are short and the same every time; --hypothesis-profile long looks further.
settings.register_profile("ci", max_examples=40, derandomize=True, deadline=None, database=None)
settings.register_profile("long", max_examples=3000, deadline=None)
settings.load_profile("ci")


def _runs_on(device: str) -> list[str]:
    names = [name for name in backends.BACKENDS if backends.why_not_loaded(name) is None]
    return [n for n in names if n == "reference" or backends.kernels(n).device == device]


def is_emulated(name: str) -> bool:
    """Whether these are a GPU's kernels in an emulator, a thousand times slower than there."""
    return name != "reference" and backends.kernels(name).emulated


# On the host: those that are not a GPU's kernels in an emulator, and all of them.
RUNNABLE = [name for name in _runs_on("cpu") if not is_emulated(name)]
EVERY = _runs_on("cpu") + (["cuda"] if cuda_on_cpu.why_not() is None else [])
ON_GPU = _runs_on("cuda") if torch.cuda.is_available() else []


def _places(names: list[str]) -> list:
    """A fixture's parameters: (backend, device)."""
    gpu = [pytest.param((n, "cuda"), id=f"{n}-gpu", marks=pytest.mark.gpu) for n in ON_GPU]
    return [pytest.param((name, "cpu"), id=name) for name in names] + gpu


@contextlib.contextmanager
def _running(place: tuple[str, str]):
    """Ask for a backend, and make new tensors on the device where it is to run."""
    name, device = place
    with contextlib.ExitStack() as stack:
        if place == ("cuda", "cpu"):
            cuda_on_cpu.load()
            stack.enter_context(backends.emulating("cuda", cuda_on_cpu.KERNELS))
        stack.enter_context(backends.use_backend(name))
        torch.set_default_device(device)
        try:
            yield name
        finally:
            torch.set_default_device(None)


@pytest.fixture(params=_places(EVERY))
def backend(request):
    """Run the test once on every backend that can run here, emulated or not, host and GPU; a test
    with a parameter ``dtype`` only where the backend serves that."""
    dtype = request.node.callspec.params.get("dtype", torch.float32)
    if request.param[0] != "reference" and dtype not in backends.kernels(request.param[0]).dtypes:
        pytest.skip(f"{request.param[0]} does not serve {dtype} here")
    with _running(request.param) as name:
        yield name


@pytest.fixture(params=_places(RUNNABLE))
def unemulated(request):
    """As ``backend``, without the emulators: for whole models, which they take minutes for."""
    with _running(request.param) as name:
        yield name


@pytest.fixture(
    params=[("fused", name) for name in RUNNABLE] + [("packed", None), ("padded", None)],
    ids=lambda param: "-".join(filter(None, param)),
)
def path(request):
    """Each path of a model; the fused one on every backend that can run here, as it alone depends
    on it."""
    which, name = request.param
    with backends.use_backend(name):
        yield which


@pytest.fixture(params=[place for place in _places(EVERY) if place.values[0][0] != "reference"])
def kernels(request):
    """As ``backend``, without ``reference``: for what only kernels promise."""
    with _running(request.param) as name:
        yield name


@pytest.fixture(params=["compiled", "reference"])
def builder(request):
    """Run the test once with the compiled builder and once with its NumPy implementation."""
    if request.param == "compiled" and backends.compiled_batching.reason:
        pytest.skip(f"no compiled builder: {backends.compiled_batching.reason}")
    with backends.use_backend("reference" if request.param == "reference" else None):
        yield request.param


def pytest_addoption(parser):
    parser.addoption(
        "--no-reference",
        action="store_true",
        help="leave out the tests whose parameter asks for the reference: for runs under other "
        "conditions than the main one that are the same to it",
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Without the garbage collector, which would look through all tests found so far again and
    again: a third of the time that it takes to find them. Nor does it look at them later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def _asks_for_the_reference(item) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    asked = [params.get(name) for name in ("backend", "unemulated", "builder", "path")]
    return "reference" in asked or ("reference", "cpu") in asked or ("fused", "reference") in asked


def pytest_collection_modifyitems(config, items):
    """Refuse marks that name an operation that does not exist; ``--no-reference``."""
    if config.getoption("no_reference"):
        config.hook.pytest_deselected(items=[i for i in items if _asks_for_the_reference(i)])
        items[:] = [item for item in items if not _asks_for_the_reference(item)]
    for item in items:
        for mark in item.iter_markers("operation"):
            if mark.args not in [(folder,) for folder in operations.FOLDERS]:
                raise pytest.UsageError(
                    f"mark operation: expected one of {operations.FOLDERS}, got {mark.args} "
                    f"({item.nodeid})"
                )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _exact_products():
    """Of recurrent layers on a GPU, cuDNN's and the package's: float64 is what they are compared
    with. By default they are TF32."""
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def compiled():
    """Skip where the compiled kernels are absent, saying why."""
    reason = backends.why_not_loaded("cpu")
    if reason is not None:
        pytest.skip(f"no compiled kernels: {reason}")
