"""Asking for a backend: it holds where it was asked for, nowhere else, and no longer."""

from __future__ import annotations

import asyncio
import contextvars
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils.data import DataLoader

from ehrseq_fast import backend, use_backend, visit_mean_pool

CODES = torch.tensor([[1, 2, 0], [2, 0, 0]])


def in_thread(function, *arguments):
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments)))
    thread.start()
    thread.join()
    return results[0]


def test_blocks_nest():
    assert backend.requested() is None
    with use_backend("reference"):
        with use_backend(None):
            assert backend.requested() is None
        assert backend.requested() == "reference"
        with (
            pytest.raises(RuntimeError, match="expected one of"),
            use_backend("quick"),
        ):
            pass
        assert backend.requested() == "reference"
    assert backend.requested() is None


def test_a_block_that_raises_ends():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backend.requested() is None


def test_leaving_a_block_under_a_backend_that_cannot_run():
    """What the environment asked for is refused where it is used, not where a block is left."""
    name = "quick" if torch.cuda.is_available() else "cuda"
    code = f"""
import torch, ehrseq_fast
from ehrseq_fast import backend
codes = torch.tensor([[1, 0]])
with ehrseq_fast.use_backend("reference"):
    ehrseq_fast.visit_mean_pool(codes, torch.ones(2, 2), codes != 0)
assert backend.requested() == {name!r}
try:
    ehrseq_fast.visit_mean_pool(codes, torch.ones(2, 2), codes != 0)
except RuntimeError as error:
    assert "backend {name!r} was asked for, but cannot run" in str(error), error
else:
    raise AssertionError("not refused")
with ehrseq_fast.use_backend(None):
    ehrseq_fast.visit_mean_pool(codes, torch.ones(2, 2), codes != 0)
"""
    environment = os.environ | {"EHRSEQ_FAST_BACKEND": name}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_threads_that_interleave():
    """The first enters, the second enters, the first leaves, the second leaves."""
    entered, left = threading.Event(), threading.Event()
    seen = []

    def first():
        with use_backend("reference"):
            entered.set()
            assert second_entered.wait(10)
            seen.append(backend.requested())
        left.set()

    second_entered = threading.Event()
    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(10)
    assert backend.requested() is None
    with use_backend(None):
        second_entered.set()
        assert left.wait(10)
        assert backend.requested() is None
    thread.join()
    assert seen == ["reference"]
    assert backend.requested() is None
    assert in_thread(backend.requested) is None


def test_a_thread_takes_a_block_over_in_a_copied_context_alone():
    with use_backend("reference"):
        assert in_thread(backend.requested) is None
        assert in_thread(contextvars.copy_context().run, backend.requested) == "reference"


def test_tasks_of_an_event_loop():
    async def asks(name, pause):
        with use_backend(name):
            await asyncio.sleep(pause)
            return backend.requested()

    async def child():
        return backend.requested()

    async def main():
        with use_backend("reference"):
            started_inside = asyncio.create_task(child())
        found = await asyncio.gather(asks("reference", 0.02), asks(None, 0.01), child())
        return [*found, await started_inside]

    assert asyncio.run(main()) == ["reference", None, None, "reference"]
    assert backend.requested() is None


def test_generators_closed_in_any_order_and_anywhere():
    def holds(name):
        with use_backend(name):
            yield backend.requested()

    first, second = holds("reference"), holds(None)
    assert next(first) == "reference"
    assert next(second) is None
    first.close()
    assert backend.requested() is None
    second.close()
    assert backend.requested() is None

    third = holds("reference")
    next(third)
    in_thread(third.close)  # its block ends there, and is not to raise for that
    assert in_thread(backend.requested) is None
    assert backend.requested() is None  # nor is it open here any more


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_functions_follow_the_choice(compiled, fullgraph):
    torch._dynamo.reset()

    def pool(weight):
        return visit_mean_pool(CODES, weight, CODES != 0), backend.requested()

    fast = torch.compile(pool, backend="eager", fullgraph=fullgraph)
    weight = torch.rand(3, 2)
    for name in (None, "reference", None, "cpu"):
        with use_backend(name):
            pooled, asked = fast(weight)
            assert asked == name
            torch.testing.assert_close(pooled, pool(weight)[0])
            assert in_thread(fast, weight)[1] is None


def test_backward_is_that_of_the_forwards_backend():
    """In another thread, as autograd runs it for a GPU, and after the block."""
    weight = torch.rand(3, 2, requires_grad=True)
    with use_backend("reference"):
        loss = visit_mean_pool(CODES, weight, CODES != 0).sum()
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    assert not any("VisitPool" in type(node).__name__ for node in seen)
    with use_backend(None):
        in_thread(loss.backward)
    expected = torch.tensor([[0.0, 0.0], [0.5, 0.5], [1.5, 1.5]])
    torch.testing.assert_close(weight.grad, expected)


class Asked(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return backend.requested() or "nothing"


def test_forked_workers_inherit_the_choice():
    with use_backend("reference"):
        loader = DataLoader(Asked(), num_workers=1, multiprocessing_context="fork")
        assert list(loader) == [["reference"]]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_functions_in_tasks_that_interleave(fullgraph):
    """A task is suspended inside its block; what another one compiled or asked for meanwhile is not
    its own."""
    torch._dynamo.reset()
    found = []

    def asks(x):
        return x + 1, backend.requested()

    fast = torch.compile(asks, backend="eager", fullgraph=fullgraph)

    def look(who):
        found.append((who, fast(torch.ones(1))[1], backend.requested()))

    async def first(turn, other):
        look("first")
        with use_backend("reference"):
            other.set()
            await turn.wait()
            look("first, inside")
        look("first, after")

    async def second(turn, other):
        await turn.wait()
        look("second")
        with use_backend(None), use_backend("cpu"):
            look("second, inside")
            other.set()
            await asyncio.sleep(0)
            look("second, inside")
        look("second, after")

    async def main():
        turns = asyncio.Event(), asyncio.Event()
        await asyncio.gather(first(*turns), second(*reversed(turns)))

    asyncio.run(main())
    assert len(found) == 7
    assert all(compiled == eager for _, compiled, eager in found), found
    assert ("first, inside", "reference", "reference") in found


def test_a_compiled_function_after_a_block_was_closed_elsewhere():
    torch._dynamo.reset()

    def holds():
        with use_backend("reference"):
            yield

    fast = torch.compile(lambda x: (x + 1, backend.requested()), backend="eager")
    held = holds()
    next(held)
    assert fast(torch.ones(1))[1] == "reference"
    in_thread(held.close)
    assert fast(torch.ones(1))[1] is None
