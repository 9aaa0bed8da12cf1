"""Small work stays on the calling thread; threads are set as the caller is; forked children."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

from ehrseq_fast import (
    PackedVisits,
    discrete_time_survival_nll,
    packed_survival_nll,
    packed_visit_pool,
    visit_mean_pool,
)
from ehrseq_fast.linear.op import linear_layer
from tests.recurrent_layers import CELLS

from .teams import most_shares, team

WIDTH = 128


@pytest.fixture(autouse=True)
def four_threads(compiled):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    most_shares()
    yield
    torch.set_num_threads(before)


def pooled(patients: int) -> None:
    batch = PackedVisits.from_lists([[[1, 2, 3]] * 4] * patients, vocab_size=20)
    table = torch.randn(20, WIDTH, requires_grad=True)
    packed_visit_pool(batch, table).sum().backward()


def padded(patients: int) -> None:
    codes = torch.arange(patients * 4 * 6).view(patients, 4, 6) % 20
    table = torch.randn(20, WIDTH, requires_grad=True)
    visit_mean_pool(codes, table, codes % 3 == 0).sum().backward()


def loss(patients: int) -> None:
    hazards = torch.rand(patients, 50, requires_grad=True)
    times = torch.arange(patients) % 50
    mask = torch.arange(50) <= times[:, None]
    discrete_time_survival_nll(hazards, times, times % 2, mask).backward()


def packed_loss(patients: int) -> None:
    batch = PackedVisits.from_lists([[[1]] * 50] * patients, vocab_size=20)
    times = torch.full((patients,), 49)
    hazards = torch.rand(batch.n_visits, requires_grad=True)
    packed_survival_nll(hazards, batch, event_times=times, event_indicators=times % 2).backward()


def layer(patients: int) -> None:
    rows = torch.randn(patients, WIDTH, requires_grad=True)
    linear_layer(rows, torch.randn(64, WIDTH), torch.randn(64), "relu").sum().backward()


def recurrent(patients: int) -> None:
    cell = CELLS["lstm"]
    sequence = PackedSequence(torch.randn(patients, 16), torch.tensor([patients]))
    output, _ = cell.function(sequence, [cell.weights(16, 32, dtype=torch.float32)])
    output.data.sum()


@pytest.mark.parametrize(
    ("work", "small", "large"),
    [
        (pooled, 32, 4096),
        (padded, 32, 4096),
        (loss, 200, 20000),
        (packed_loss, 200, 20000),
        (layer, 200, 4096),
        (recurrent, 64, 2048),
    ],
)
def test_small_work_stays_on_the_calling_thread(work, small, large):
    with team("torch"):
        work(small)
        assert most_shares() == 1
        work(large)
        assert most_shares() == 4


def test_a_scan_of_a_millisecond_stays_on_the_calling_thread_where_others_come_late():
    with team("late"):
        recurrent(2048)
        assert most_shares() == 1
        recurrent(2 << 16)
        assert most_shares() == 4


@pytest.mark.parametrize("name", ["torch", "helpers"])
def test_one_thread_is_one_thread(name):
    torch.set_num_threads(1)
    with team(name):
        pooled(4096)
    assert most_shares() == 1


@pytest.mark.parametrize("name", ["torch", "helpers"])
def test_all_threads_flush_subnormal_numbers_or_none(name):
    batch = PackedVisits.from_lists([[[1, 2]] * 8] * 20_000, vocab_size=3)
    table = torch.full((3, WIDTH), 1.5e-38)  # its half is subnormal
    table[2] = -1.3e-38
    # a thread that is started later would take over how this one is set, and of less work helpers
    # may come too late for any
    with team(name):
        packed_visit_pool(batch, table)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        with team(name):
            found = packed_visit_pool(batch, table)
    finally:
        torch.set_flush_denormal(False)
    assert most_shares() == 4
    assert torch.equal(found, found[:1].expand_as(found))


def test_errors_of_helpers_reach_the_caller():
    codes = torch.ones(4096, 1, 6, dtype=torch.int64)
    codes[4000:] = 99
    with team("helpers"), pytest.raises(IndexError, match=r"codes\[4000, 0, 0\]"):
        visit_mean_pool(codes, torch.randn(20, WIDTH), torch.ones_like(codes, dtype=torch.bool))


FORKED = """
import os, signal, torch
from ehrseq_fast import discrete_time_survival_nll
torch.set_num_threads(3)
torch.randn(1_000_000).exp()  # OpenMP's threads are there
hazards = torch.rand(4096, 60, requires_grad=True)
times = torch.arange(4096) % 60
mask = torch.ones(4096, 60, dtype=torch.bool)

def compute():
    loss = discrete_time_survival_nll(hazards, times, times % 2, mask)
    return loss.detach(), torch.autograd.grad(loss, hazards)[0]

expected = compute()
child = os.fork()
if child == 0:
    signal.alarm(60)
    found = compute()
    torch.set_num_threads(1)  # PyTorch's own operations would wait for ever
    os._exit(0 if all(map(torch.equal, found, expected)) else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""


def test_a_forked_child_computes_on_threads_of_its_own():
    done = subprocess.run(
        [sys.executable, "-c", FORKED],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
