"""The survival loss, forward and backward, against its own definition in plain PyTorch.

``python -m benchmarks.survival_nll`` prints the table; ``measure`` gives the times.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ehrseq_fast.survival_nll import discrete_time_survival_nll, reference

PATIENTS, SLOTS = 4096, 200
WARM_CALLS = 5
WORKLOAD = (
    f"discrete-time survival NLL, forward and backward, float32 hazards {PATIENTS} x {SLOTS}, "
    "lengths uniform in 1..200, event times uniform in each patient's visits, 30 % seen, bool mask"
)

# Each takes (hazards, event_times, event_indicators, sequence_mask) to the mean loss.
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def draw_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of a loss for the workload."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, SLOTS + 1, (PATIENTS,), generator=generator)
    times = (torch.rand(PATIENTS, generator=generator) * lengths).long()
    seen = torch.rand(PATIENTS, generator=generator) < 0.3
    mask = torch.arange(SLOTS) < lengths[:, None]
    hazards = torch.rand(PATIENTS, SLOTS, generator=generator).requires_grad_()
    return hazards, times, seen, mask


def variants() -> dict[str, Loss]:
    """What is compared: the definition, that compiled by torch, and this package's."""
    compiled = torch.compile(reference.discrete_time_survival_nll, fullgraph=True)
    return {
        "eager reference": reference.discrete_time_survival_nll,
        "torch.compile of it": compiled,
        "ehrseq_fast": discrete_time_survival_nll,
    }


def measure(repeats: int = 30) -> dict[str, list[float]]:
    """Seconds per forward and backward of each variant, interleaved, once they were found equal.

    Every timed call follows untimed ones of its own variant. Else what the eager reference leaves
    in the caches (none of the inputs: it writes over 50 MB) would be charged to its successor,
    while in training the hazards were written just before.

    Raises:
        AssertionError: if a variant's loss or gradient is not the reference's.
    """
    keep_freed_memory()
    batch = draw_batch()
    losses = variants()
    assert_equal(losses, batch)
    for loss in losses.values():  # also lets torch.compile finish
        for _ in range(5):
            timed(loss, batch)
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(repeats):
        for name, loss in losses.items():
            for _ in range(WARM_CALLS):
                timed(loss, batch)
            seconds[name].append(timed(loss, batch))
    return seconds


def timed(loss: Loss, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    """One forward and backward."""
    batch[0].grad = None
    start = time.perf_counter()
    loss(*batch).backward()
    return time.perf_counter() - start


def assert_equal(losses: dict[str, Loss], batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Every variant against the reference in float64."""
    hazards, *outcomes = batch
    oracle_hazards = hazards.detach().double().requires_grad_()
    oracle = reference.discrete_time_survival_nll(oracle_hazards, *outcomes)
    oracle.backward()
    for name, loss in losses.items():
        hazards.grad = None
        value = loss(*batch)
        value.backward()
        for actual, expected in ((value, oracle), (hazards.grad, oracle_hazards.grad)):
            torch.testing.assert_close(
                actual.double(), expected, rtol=1e-5, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed, for every variant alike.

    Else it hands large buffers back and takes them anew, now and then, and the page faults (a
    millisecond for the gradient's 3.3 MB on a virtual machine) are what is measured.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # another C library: its own rules
    trim_threshold, mmap_threshold = -1, -3
    mallopt(trim_threshold, 1 << 30)
    mallopt(mmap_threshold, 1 << 25)  # the most that it takes


def main() -> None:
    """Print the comparison."""
    seconds = measure()
    print(f"{WORKLOAD}; {torch.get_num_threads()} threads")
    print("all losses and gradients equal to the reference in float64")
    ours = statistics.median(seconds["ehrseq_fast"])
    for name, times in seconds.items():
        median = statistics.median(times)
        low, high = statistics.quantiles(times, n=10)[0], statistics.quantiles(times, n=10)[-1]
        print(
            f"{name:20s} {median * 1e6:9.1f} us  (p10 {low * 1e6:.1f}, p90 {high * 1e6:.1f})  "
            f"{median / ours:6.1f} x"
        )


if __name__ == "__main__":
    main()
