"""The packed LSTM alone, against every way that PyTorch has, and against its own products.

The records are synthetic: lengths log-normal (median 8, sigma 1.1, at most 200), as records of
patients are. ``python -m benchmarks lstm`` prints the table of all sizes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ehrseq_fast import PackedLSTM

from .machine import describe_machine
from .report import add_saving_arguments, describe_run, save
from .timing import Samples, interleaved, plan, seconds

SUMMARY = "the packed LSTM alone, over batch sizes and widths, against PyTorch's ways and floors"

OURS = "ehrseq_fast"
PACK_PAD = "pack, nn.LSTM, pad"
ROWS = "nn.LSTM, packed rows"
PADDED = "nn.LSTM, padded"
BUCKETS = "nn.LSTM, length buckets"
PRODUCTS = "its products alone"
READING = "reading the weights each step"

PYTORCH = (PACK_PAD, ROWS, PADDED, BUCKETS)

Run = Callable[[], list[Tensor]]


class Workload:
    """One batch of records in every form that the variants take, and one LSTM's weights."""

    def __init__(self, patients: int, hidden: int, inputs: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        draws = torch.randn(patients, generator=generator)
        lengths = torch.exp(torch.tensor(8.0).log() + 1.1 * draws).round().clamp(1, 200)
        self.lengths = lengths.long().sort(descending=True).values
        self.times = int(self.lengths[0])
        self.dtype = dtype
        torch.manual_seed(0)
        self.plain = nn.LSTM(inputs, hidden).to(dtype)
        self.fast = PackedLSTM(inputs, hidden).to(dtype)
        self.fast.load_state_dict(self.plain.state_dict())
        alive = torch.arange(self.times)[:, None] < self.lengths
        self.padded = torch.randn(self.times, patients, inputs).to(dtype) * alive[..., None]
        self.packed = pack_padded_sequence(self.padded, self.lengths)
        self.gradient = torch.randn(self.times, patients, hidden).to(dtype) * alive[..., None]
        self.packed_gradient = pack_padded_sequence(self.gradient, self.lengths).data
        self.buckets = list(self._buckets())

    def _buckets(self, shortest: float = 0.7):
        """Patients whose lengths lie within 30 % of the longest among them, padded to that."""
        first = 0
        while first < len(self.lengths):
            times = int(self.lengths[first])
            within = int((self.lengths >= shortest * times).sum())
            yield slice(0, times), slice(first, within)
            first = within


def measure(
    patients: int,
    hidden: int,
    *,
    inputs: int = 128,
    backward: bool = True,
    dtype: torch.dtype = torch.float32,
    leave_out: Sequence[str] = (),
    budget_s: float = 20.0,
) -> Samples:
    """Seconds of each variant, forward and (with ``backward``) backward, taking turns.

    ``nn.LSTM`` gets the padded tensors, buckets or packed rows ready made, save in "pack, nn.LSTM,
    pad", where making them is part of the job. "Its products alone" are the products of an LSTM
    over all visits at once, by ``torch.mm`` into memory that is there: two forward, six with the
    backward pass. "Reading the weights each step" is one ``torch.mv`` with the recurrent weights
    per step (two with the backward pass): what a batch of few patients cannot go below.

    Raises:
        AssertionError: if the variants' outputs or gradients are not the same.
    """
    work = Workload(patients, hidden, inputs, dtype)
    runs = {name: run for name, run in variants(work, backward).items() if name not in leave_out}
    check_equal(work, runs, backward)
    runs |= floors(work, backward)
    estimates = {name: seconds(run) for name, run in runs.items()}
    return interleaved(runs, plan(estimates, budget_s, least_rounds=2, most_rounds=40))


def variants(work: Workload, backward: bool) -> dict[str, Run]:
    """Each gives its outputs and, of its input and weights, the gradients."""

    def once(lstm: nn.LSTM, inputs: list[Tensor], gradients: list[Tensor], forward) -> Run:
        def forward_only() -> list[Tensor]:
            with torch.no_grad():
                return [forward(x) for x in inputs]

        def both() -> list[Tensor]:
            outputs = [forward(x) for x in inputs]
            grads = torch.autograd.grad(outputs, [*inputs, *lstm.parameters()], gradients)
            return [*(out.detach() for out in outputs), *grads]

        if backward:
            inputs = [x.detach().requires_grad_() for x in inputs]
        return both if backward else forward_only

    plain, sizes = work.plain, work.packed.batch_sizes

    def packed_between(x: Tensor) -> Tensor:
        return pad_packed_sequence(plain(pack_padded_sequence(x, work.lengths))[0])[0]

    rows, rows_gradient = [work.packed.data], [work.packed_gradient]
    cut = [work.padded[times, who].contiguous() for times, who in work.buckets]
    cut_gradient = [work.gradient[times, who].contiguous() for times, who in work.buckets]
    return {
        OURS: once(
            work.fast, rows, rows_gradient, lambda x: work.fast(PackedSequence(x, sizes))[0].data
        ),
        PACK_PAD: once(plain, [work.padded], [work.gradient], packed_between),
        ROWS: once(plain, rows, rows_gradient, lambda x: plain(PackedSequence(x, sizes))[0].data),
        PADDED: once(plain, [work.padded], [work.gradient], lambda x: plain(x)[0]),
        BUCKETS: once(plain, cut, cut_gradient, lambda x: plain(x)[0]),
    }


def check_equal(work: Workload, runs: dict[str, Run], backward: bool) -> None:
    """Compare every variant's results with ours, packed rows with packed rows."""

    def as_rows(name: str, results: list[Tensor]) -> list[Tensor]:
        if name in (OURS, ROWS):
            return results
        if name == BUCKETS:
            results = merged(work, results, backward)
        rows = [pack_padded_sequence(x, work.lengths).data for x in results[: 1 + backward]]
        return rows + results[1 + backward :]

    expected = as_rows(OURS, runs[OURS]())
    # oneDNN approximates the activations.
    bound = 1e-4 if work.dtype == torch.float32 else 0.1
    for name, run in runs.items():
        for mine, theirs in zip(expected, as_rows(name, run()), strict=True):
            scale = float(mine.abs().max())
            torch.testing.assert_close(theirs, mine, rtol=0, atol=bound * scale)


def merged(work: Workload, results: list[Tensor], backward: bool) -> list[Tensor]:
    """Results of the buckets as one padded tensor each."""
    padded = []
    count = len(work.buckets)
    for i, like in enumerate([work.gradient, work.padded][: 1 + backward]):
        whole = torch.zeros_like(like)
        for (times, who), part in zip(work.buckets, results[i * count :], strict=False):
            whole[times, who] = part
        padded.append(whole)
    return padded + results[(1 + backward) * count :]


def floors(work: Workload, backward: bool) -> dict[str, Run]:
    """The products of an LSTM over all visits at once, and reading its weights at each step."""
    weight_ih, weight_hh = (w.detach() for w in work.plain.all_weights[0][:2])
    x = work.packed.data
    h = torch.randn(len(x), weight_hh.shape[1]).to(work.dtype)
    gates = torch.randn(len(x), len(weight_hh)).to(work.dtype)
    out_gates, out_x, out_h = (torch.empty_like(t) for t in (gates, x, h))
    out_ih, out_hh = torch.empty_like(weight_ih), torch.empty_like(weight_hh)

    def products() -> list[Tensor]:
        torch.mm(x, weight_ih.t(), out=out_gates)
        torch.mm(h, weight_hh.t(), out=out_gates)
        if backward:
            torch.mm(gates, weight_hh, out=out_h)
            torch.mm(gates, weight_ih, out=out_x)
            torch.mm(gates.t(), x, out=out_ih)
            torch.mm(gates.t(), h, out=out_hh)
        return []

    state, gate = h[0].clone(), gates[0].clone()

    def reading() -> list[Tensor]:
        for _ in range(work.times):
            torch.mv(weight_hh, state, out=gate)
            if backward:
                torch.mv(weight_hh.t(), gate, out=state)
        return []

    return {PRODUCTS: products, READING: reading}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--patients", type=int, nargs="+", default=[32, 64, 256, 1024])
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--leave-out", nargs="+", choices=PYTORCH, default=[])
    parser.add_argument("--budget", type=float, default=6.0, help="seconds per size and pass")
    parser.add_argument("--dtype", default="float32")
    add_saving_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    machine = describe_machine()
    print(describe_run(machine))
    cells = []
    for backward in (True, False):
        title = "forward and backward" if backward else "forward alone"
        print(f"\n{title}: ms of ours, and how many times that the others take", flush=True)
        print(" | ".join(["patients", "hidden", OURS, *PYTORCH, PRODUCTS, READING]))
        for patients in args.patients:
            for hidden in args.hidden:
                samples = measure(
                    patients,
                    hidden,
                    backward=backward,
                    dtype=getattr(torch, args.dtype),
                    leave_out=args.leave_out,
                    budget_s=args.budget,
                )
                medians = {name: median(taken) for name, taken in samples.items()}
                cells.append(
                    {
                        "patients": patients,
                        "hidden": hidden,
                        "backward": backward,
                        "median_s": medians,
                        "runs": {name: len(taken) for name, taken in samples.items()},
                    }
                )
                print(cell_text(cells[-1]), flush=True)
    results = {
        "command": "lstm",
        "machine": machine,
        "dtype": args.dtype,
        "inputs": 128,
        "cells": cells,
    }
    save(results, args)
    return results


def cell_text(cell: dict[str, Any]) -> str:
    """One row of the table."""
    medians = cell["median_s"]
    ours = medians[OURS]
    others = [
        f"{medians[name] / ours:.2f}" if name in medians else ""
        for name in (*PYTORCH, PRODUCTS, READING)
    ]
    return " | ".join([f"{cell['patients']}", f"{cell['hidden']}", f"{1e3 * ours:.2f}", *others])
