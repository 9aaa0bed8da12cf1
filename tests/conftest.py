"""Fixtures that every room shares: the backends that can run here, and seeds."""

from __future__ import annotations

import pytest
import torch

from ehrseq_fast import backend as backends

RUNNABLE = [name for name in backends.BACKENDS if backends.why_not_loaded(name) is None]


@pytest.fixture(params=RUNNABLE)
def backend(request):
    """Run the test once on every backend that can run here."""
    with backends.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def compiled():
    """Skip where the compiled kernels are absent, saying why."""
    reason = backends.why_not_loaded("cpu")
    if reason is not None:
        pytest.skip(f"no compiled kernels: {reason}")
