"""Whether the packed LSTM's CUDA kernels are right, and faster than cuDNN, on the GPU that is here.

Equality with float64, the same bits on every repeat, then microseconds per time step (the longest
record has ``times`` of them) of four ways to compute a layer: the package's kernels, cuDNN on
packed rows, cuDNN on padded ones, and cuDNN on chunks of patients of like length, each padded to
its own longest; and a whole training step. What compute-sanitizer said is passed in, as it has to
be run from outside: ``.ci/on-gpu lstm`` does both. With ``--write`` the run takes its place in
``ehrseq_fast/cuda_lstm.json``, which decides the default (``ehrseq_fast/packed_lstm/cuda.py``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_sequence

from ehrseq_fast import PackedVisits, packed_lstm, use_backend
from ehrseq_fast.models import DiscreteTimeSurvivalLSTM
from ehrseq_fast.packed_lstm import cuda

from . import devices, machine, suite

SUMMARY = "settle, on a GPU, whether the packed LSTM's CUDA kernels are the default there"

CHUNK = 64  # patients of like length that are padded together
# By what hidden states are multiplied in, from float64, of the largest value of each tensor.
BOUNDS = {"float32": 3e-5, "tf32": 2.0**-9, "bfloat16": 2.0**-6, "float16": 2.0**-9}
LAYERS = ("ours", "cudnn_packed", "cudnn_padded", "cudnn_sorted")


@dataclass(frozen=True)
class Sizes:
    """What is run."""

    patients: Sequence[int] = (32, 128, 256, 1024)
    hidden: Sequence[int] = (128, 192, 256, 384, 512)
    arithmetics: Sequence[str] = tuple(BOUNDS)
    inputs: int = 128
    longest: int = 200
    repeats: int = 1000
    rounds: int = 4
    codes: int = 5000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for check in ("racecheck", "synccheck"):
        parser.add_argument(
            f"--{check}", choices=("passed", "failed"), help="what compute-sanitizer said"
        )
    parser.add_argument("--write", action="store_true", help=f"to {cuda.RESULTS.name}")


def run(args: argparse.Namespace) -> None:
    suite.refuse_what_cannot_run("cuda", "cuda")
    found = measure("cuda", Sizes())
    found |= {name: getattr(args, name) == "passed" for name in ("racecheck", "synccheck")}
    print(table(found))
    if args.write:
        others = [run for run in cuda.committed_runs() if run["gpu"] != found["gpu"]]
        cuda.RESULTS.write_text(json.dumps([*others, found], indent=1) + "\n")
    if not all(found[check] for check in cuda.CHECKS):
        failed = ", ".join(check for check in cuda.CHECKS if not found[check])
        raise SystemExit(f"cuda-lstm: expected every check to pass, got: not {failed}")


@contextlib.contextmanager
def package() -> Iterator[None]:
    """The package's kernels, the LSTM's included."""
    with use_backend("cuda"):
        yield


@contextlib.contextmanager
def package_with_cudnn() -> Iterator[None]:
    """The package's kernels for everything but the LSTM."""
    before = os.environ.get(cuda.SWITCH)
    os.environ[cuda.SWITCH] = "0"
    try:
        with use_backend("cuda"):
            yield
    finally:
        os.environ.pop(cuda.SWITCH)
        if before is not None:
            os.environ[cuda.SWITCH] = before


def measure(device: str, sizes: Sizes) -> dict[str, Any]:
    """A run, all but what compute-sanitizer says."""
    timer = devices.device(device)
    served = {
        arithmetic: [hidden for hidden in sizes.hidden if _is_served(hidden, arithmetic, device)]
        for arithmetic in sizes.arithmetics
    }
    described = machine.describe_machine(device) | devices.describe(timer)
    found: dict[str, Any] = {
        "gpu": described.get("gpu", device),
        **{name: described.get(name) for name in ("measured_at", "commit", "torch", "cudnn")},
        **dict.fromkeys(("equal_to_float64", "same_bits_1000_times"), True),
        "rows": [],
        "steps": [],
    }
    for arithmetic, of_arithmetic in served.items():
        with multiplied_in(arithmetic):
            for hidden, patients in product(of_arithmetic, (min(sizes.patients) + 1, 300)):
                at_most = min(patients, max(sizes.patients))
                layer = Layer(at_most, hidden, sizes, device, arithmetic)
                found["equal_to_float64"] &= _is_equal(layer, BOUNDS[arithmetic])
            at_most = min(256, max(sizes.patients))
            layer = Layer(at_most, max(of_arithmetic), sizes, device, arithmetic)
            found["same_bits_1000_times"] &= _has_same_bits(layer, sizes.repeats)
    for arithmetic, hidden, patients in product(sizes.arithmetics, sizes.hidden, sizes.patients):
        with multiplied_in(arithmetic):
            is_served = hidden in served[arithmetic]
            layer = Layer(patients, hidden, sizes, device, arithmetic)
            found["rows"].append(_row(timer, layer, arithmetic, is_served, sizes))
            if arithmetic == "float32" and is_served:
                steps = alternating(timer, whole_steps(patients, hidden, sizes, device), 3)
                taken_ms = {name: 1e3 * seconds for name, seconds in steps.items()}
                found["steps"].append({"hidden": hidden, "patients": patients, **taken_ms})
    return found


@contextlib.contextmanager
def multiplied_in(arithmetic: str) -> Iterator[None]:
    """Recurrent layers of float32 take TF32, cuDNN's too, or do not."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = arithmetic == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _dtype_of(arithmetic: str) -> torch.dtype:
    return torch.float32 if arithmetic == "tf32" else getattr(torch, arithmetic)


def _row(
    timer: devices.Device, layer: Layer, arithmetic: str, is_served: bool, sizes: Sizes
) -> dict[str, Any]:
    """Microseconds per time step of every way."""
    row: dict[str, Any] = {"arithmetic": arithmetic, "hidden": layer.plain.hidden_size}
    row |= {"patients": int(layer.packed.batch_sizes[0]), "times": layer.times}
    names = [name for name in LAYERS if name != "ours" or is_served]
    for suffix, way in (("_forward", layer.forward), ("", layer.forward_and_backward)):
        seconds = alternating(timer, {name: _of(way, name) for name in names}, sizes.rounds)
        for name in LAYERS:
            taken = seconds.get(name)
            row[name + suffix] = None if taken is None else 1e6 * taken / layer.times
    return row


def _is_served(hidden: int, arithmetic: str, device: str) -> bool:
    with package():
        data = torch.empty(0, dtype=_dtype_of(arithmetic), device=device)
        return cuda.why_not(data, hidden) is None


def _of(way: Callable[[str], object], name: str) -> Callable[[], object]:
    return lambda: way(name)


def alternating(
    timer: devices.Device, ways: dict[str, Callable[[], object]], rounds: int
) -> dict[str, float]:
    """Medians of the seconds of each, one after the other in each round; untimed calls first."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            taken[name].append(timer.time(way, warm_ups=1).seconds)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def drawn_lengths(patients: int, longest: int) -> list[int]:
    """Log-normal, half of them up to 8."""
    normal = torch.randn(patients, generator=torch.Generator().manual_seed(patients))
    return torch.exp(2.08 + 1.1 * normal).round().clamp(1, longest).int().tolist()


class Layer:
    """One layer and direction, and records for it in the forms that the ways take."""

    def __init__(
        self, patients: int, hidden: int, sizes: Sizes, device: str, arithmetic: str
    ) -> None:
        dtype = _dtype_of(arithmetic)
        torch.manual_seed(0)
        self.plain = nn.LSTM(sizes.inputs, hidden).to(dtype)
        self.exact = nn.LSTM(sizes.inputs, hidden).double()
        self.exact.load_state_dict(self.plain.state_dict())
        self.plain.to(device)
        lengths = sorted(drawn_lengths(patients, sizes.longest), reverse=True)
        self.times = lengths[0]
        self.host = pack_sequence([torch.randn(n, sizes.inputs).to(dtype) for n in lengths])
        visits = [torch.randn(n, sizes.inputs, device=device).to(dtype) for n in lengths]
        self.packed = self.host.to(device)
        self.packed.data.requires_grad_()
        self.padded = pad_sequence(visits).requires_grad_()
        self.chunks = [
            pad_sequence(visits[first : first + CHUNK]).requires_grad_()
            for first in range(0, patients, CHUNK)
        ]

    def outputs(self, name: str) -> tuple[list[Tensor], list[Tensor]]:
        """What a way computes, and the rows that it does so from."""
        if name == "ours":
            with package():
                return [packed_lstm(self.packed, self.plain.all_weights)[0].data], [
                    self.packed.data
                ]
        if name == "cudnn_packed":
            return [self.plain(self.packed)[0].data], [self.packed.data]
        if name == "cudnn_padded":
            return [self.plain(self.padded)[0]], [self.padded]
        return [self.plain(chunk)[0] for chunk in self.chunks], self.chunks

    def forward(self, name: str) -> object:
        with torch.no_grad():
            return self.outputs(name)

    def forward_and_backward(self, name: str) -> list[Tensor]:
        """Outputs and gradients."""
        outputs, rows = self.outputs(name)
        leaves = [*rows, *self.plain.parameters()]
        ones = [torch.ones_like(output) for output in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, ones)]


def _is_equal(layer: Layer, bound: float) -> bool:
    exact = layer.host.to(torch.float64)
    exact.data.requires_grad_()
    output = layer.exact(exact)[0].data
    leaves = [exact.data, *layer.exact.parameters()]
    expected = [output, *torch.autograd.grad(output, leaves, torch.ones_like(output))]
    pairs = zip(layer.forward_and_backward("ours"), expected, strict=True)
    return all(
        bool((mine.cpu() - theirs).abs().max() <= bound * max(1.0, theirs.abs().max().item()))
        for mine, theirs in pairs
    )


def _has_same_bits(layer: Layer, repeats: int) -> bool:
    first = layer.forward_and_backward("ours")
    return all(
        all(map(torch.equal, first, layer.forward_and_backward("ours"))) for _ in range(repeats - 1)
    )


def whole_steps(
    patients: int, hidden: int, sizes: Sizes, device: str
) -> dict[str, Callable[[], object]]:
    """A training step of a model with each kind of LSTM."""
    lengths = drawn_lengths(patients, sizes.longest)
    records = [
        [[1 + (31 * p + 7 * t + c) % (sizes.codes - 1) for c in range(1 + (p + t) % 12)]
         for t in range(length)]
        for p, length in enumerate(lengths)
    ]  # fmt: skip
    batch = PackedVisits.from_lists(
        records,
        event_times=torch.tensor(lengths) - 1,
        event_indicators=torch.arange(patients) % 2,
    ).to(device)
    model = DiscreteTimeSurvivalLSTM(sizes.codes, sizes.inputs, hidden, dropout=0.0).to(device)
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()

    def within(context: Callable[[], contextlib.AbstractContextManager[None]]) -> object:
        with context():
            step()
        return None

    return {"ours": lambda: within(package), "cudnn_packed": lambda: within(package_with_cudnn)}


def table(found: dict[str, Any]) -> str:
    """A run in Markdown."""
    lines = [
        f"{found['gpu']}, torch {found['torch']}, cuDNN {found['cudnn']}, commit {found['commit']}",
        ", ".join(f"{check}: {'yes' if found.get(check) else 'NO'}" for check in cuda.CHECKS),
        "",
        "Microseconds per time step, forward; forward and backward:",
        "",
        "| arithmetic | hidden | patients | times | " + " | ".join(LAYERS) + " |",
        "| --- " * (4 + len(LAYERS)) + "|",
    ]
    for row in found["rows"]:
        cells = [_cell(row[f"{name}_forward"], row[name]) for name in LAYERS]
        lines.append("| " + " | ".join(map(str, _keys(row) + cells)) + " |")
    lines += ["", "Milliseconds of a whole training step, float32:", ""]
    lines += ["| hidden | patients | ours | cudnn_packed |", "| --- | --- | --- | --- |"]
    for row in found["steps"]:
        cells = [f"{row[name]:.2f}" for name in ("ours", "cudnn_packed")]
        lines.append(f"| {row['hidden']} | {row['patients']} | {' | '.join(cells)} |")
    lines.append("")
    for arithmetic in dict.fromkeys(row["arithmetic"] for row in found["rows"]):
        faster = sorted(cuda.faster_sizes([found], found["gpu"], arithmetic))
        sizes = ", ".join(map(str, faster)) or "none"
        lines.append(f"The default in {arithmetic} for hidden sizes: {sizes}")
    return "\n".join(lines)


def _keys(row: dict[str, Any]) -> list[object]:
    return [row["arithmetic"], row["hidden"], row["patients"], row["times"]]


def _cell(forward: float | None, both: float | None) -> str:
    return "not served" if forward is None or both is None else f"{forward:.2f}; {both:.2f}"
