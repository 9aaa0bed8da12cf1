"""Training in several processes: who they are, how the model is divided, and what it costs.

``torchrun --nproc-per-node N -m ehrseq_fast train STORE RUN ...`` starts N processes (gloo on the
CPU, NCCL on GPUs). Each global batch of the sampler's plan is divided between them by real visits;
the loss is that of all its patients, whatever process holds them
(:class:`~ehrseq_fast.models.ModelWithLoss`), so that N processes train as one does, but for the
order of floating-point sums. That holds without dropout: with it, each process draws its own mask
for its own patients (seeded by the run's seed, the step and the rank), so a run with dropout is
reproduced by a run with the same number of processes, and equals a run with another number in
distribution only.

Process 0 alone writes. Where a process is lost, the others end with an error: at once where its
connection closes, after ``distributed.timeout_seconds`` at the latest.

What a step costs, on paper
---------------------------

Let V be the vocabulary, E the width of embeddings, H that of the recurrent layer, J the horizons,
and N the processes. With E 128, H 256 and J 5 the default model has

    V·E                      embedding           V = 20,000:  2.56 M      V = 1,000,000: 128 M
    4H·(E + H) + 8H          LSTM                             0.40 M
    2·(H·H + H) + H·(1 + J)  two heads                        0.13 M
    (biases)                                   ----------------------------------------------
                                               3.1 M = 12.3 MB            128.5 M = 514 MB

parameters (float32), and gradients of the same size. A ring all-reduce sends and receives
2·(N − 1)/N times that for each process:

    64 GPUs, V = 20,000:     24 MB a step. NVLink (about 300 GB/s): 0.1 ms; 200 Gb/s network: 1.0 ms
    64 GPUs, V = 1,000,000: 1.01 GB a step. NVLink: 3.4 ms; 200 Gb/s network: 41 ms

The work that it is to be hidden behind: a process with b visits of c codes does about
6·b·(4H·(E + H) + H·H·2) operations, 3.1 M a visit. At b = 65,536 visits that is
0.21 TFLOP, or 2 ms at 100 TFLOP/s. So with the small vocabulary the gradients (bucketed by
DistributedDataParallel behind the backward pass) are hidden over NVLink and cost up to half a step
over a network; with the large one they are what a step costs.

Dense or sparse gradients of the embedding: a step touches the distinct codes of its visits. At
b = 65,536 visits of 3 codes, under Zipf's law, they are 16,700 of V = 20,000 and 64,500 of
V = 1,000,000. Sparse gradients are gathered, not reduced: each process receives
(N − 1) · rows · (4E + 8) bytes, for V = 1,000,000 63 · 64,500 · 520 = 2.1 GB against 1.01 GB dense.
The two are equal at about 2·V / rows = 31 processes; below, sparse gradients pay. They also rule
out AdamW, which moves rows that have no gradient. So gradients are dense here, and a vocabulary
that is too large for that is divided.

``strategy: fsdp`` (FSDP2, ``fully_shard``) divides parameters, gradients and AdamW's two moments: a
process keeps 16·P/N bytes in place of 16·P. For V = 1,000,000 on 64 GPUs that is 32 MB in place of
2.06 GB; while a step runs it has all parameters besides (514 MB), which are gathered before the
forward pass ((N − 1)/N · 4P) and whose gradients are reduce-scattered after the backward pass (the
same again): the bytes of an all-reduce, 1.01 GB. The model is divided as one unit: a layer divided
by itself has hooks, and an embedding with hooks is called code by code in place of being pooled by
the kernels.

100 million patients of 50 visits of 3 codes are a store of 5·10⁹ visits and 1.5·10¹⁰ codes: 60 GB
of codes, 80 GB of times and offsets, memory-mapped once by all processes of a machine. An epoch in
global batches of 64 · 65,536 visits is 1,192 steps. At 2 ms of work and 1 ms of communication a
step (V = 20,000) that is 4 s, if loading keeps up: 22 M visits/s for each GPU, where a loading
process packs 10 M (200,000 patients of 50 visits): ``data.workers = 3`` for each GPU. The order of
all patients, which each process draws at the start of an epoch, takes 800 MB there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..models import ModelWithLoss
from .config import DistributedConfig

T = TypeVar("T")


class OtherProcessError(RuntimeError):
    """Another process has failed, or was lost."""


@dataclass(frozen=True)
class Processes:
    """The processes that train together, as one of them sees them.

    Attributes:
        rank, world_size: which of how many.
        device: where this one computes.
        strategy: ``"none"``, ``"ddp"`` or ``"fsdp"``.
    """

    rank: int
    world_size: int
    device: torch.device
    strategy: str

    @property
    def is_main(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def on_main(self, function: Callable[[], T]) -> T:
        """What ``function`` returns in process 0, in all.

        Raises:
            OtherProcessError: in the others, where it raises in process 0.
        """
        if self.world_size == 1:
            return function()
        said: list[Any] = [None, None]
        failure: BaseException | None = None
        if self.is_main:
            try:
                said = [function(), None]
            except Exception as error:
                failure, said = error, [None, f"{type(error).__name__}: {error}"]
        dist.broadcast_object_list(said, src=0)
        if failure is not None:
            raise failure
        if said[1] is not None:
            raise OtherProcessError(f"process 0 has failed: {said[1]}")
        return said[0]

    def sum(self, *values: float) -> list[float]:
        """The sums of numbers over all processes, in float64."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world_size > 1:
            dist.barrier()

    def wrap(self, model: nn.Module, **options: Any) -> nn.Module:
        """The model with its loss as one module that trains in all processes together.

        With ``"fsdp"`` the parameters of ``model`` itself are divided: an optimizer is made after.
        """
        training = ModelWithLoss(model, across_processes=self.world_size > 1, **options)
        if self.strategy == "ddp":
            return DistributedDataParallel(
                training, device_ids=[self.device] if self.device.type == "cuda" else None
            )
        if self.strategy == "fsdp":
            from torch.distributed.fsdp import fully_shard

            fully_shard(training, mesh=self._mesh())
        return training

    def _mesh(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, (self.world_size,))


def from_environment() -> tuple[int, int, int]:
    """Rank, number of processes and local rank that ``torchrun`` gives; (0, 1, 0) without it.

    Raises:
        ValueError: for a value that is not a number.
    """
    values = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        if not text.isdigit():
            raise ValueError(f"environment variable {name}: expected a number, got {text!r}")
        values.append(int(text))
    return values[0], values[1], values[2]


@contextmanager
def started(config: DistributedConfig, device: str) -> Iterator[Processes]:
    """Join the other processes that ``torchrun`` started; alone without it. A group that the caller
    made is used, and left as it is.

    Raises:
        ValueError: for a device that is not there, or a strategy that does not fit.
        OtherProcessError: where another process was lost.
    """
    rank, world_size, local_rank = from_environment()
    own_group = not (dist.is_available() and dist.is_initialized())
    if not own_group:
        rank, world_size = dist.get_rank(), dist.get_world_size()
    strategy = config.strategy
    if strategy == "auto":
        strategy = "ddp" if world_size > 1 else "none"
    if world_size > 1 and strategy == "none":
        raise ValueError(
            f"distributed.strategy: expected 'auto', 'ddp' or 'fsdp' with {world_size} processes, "
            "got 'none'"
        )
    if world_size == 1:
        strategy = "none"
    place = device_of(device, local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world_size > 1 and own_group:
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            timeout=timedelta(seconds=config.timeout_seconds),
        )
    try:
        yield Processes(rank, world_size, place, strategy)
    except RuntimeError as error:
        if world_size > 1 and _is_of_communication(error):
            raise OtherProcessError(
                f"one of the {world_size} processes was lost, or did not answer within "
                f"{config.timeout_seconds:g} s ({' '.join(str(error).split())})"
            ) from error
        raise
    # After an error there is nothing to wait for: the process ends, and its connections with it.
    if world_size > 1 and own_group:
        dist.destroy_process_group()


def _is_of_communication(error: RuntimeError) -> bool:
    if isinstance(error, OtherProcessError):
        return False
    said = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in said for word in ("gloo", "nccl", "connection reset", "timed out", "timeout")
    )


def device_of(name: str, local_rank: int = 0) -> torch.device:
    """``"auto"``, ``"cpu"``, ``"cuda"`` (of this machine, the process's own) or ``"cuda:N"``.

    Raises:
        ValueError: for another name, or a device that is not there.
    """
    there = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if there else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}"
        ) from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    index = local_rank if device.index is None else device.index
    if not there or index >= torch.cuda.device_count():
        have = torch.cuda.device_count() if there else 0
        raise ValueError(f"device: {name!r} is not there: this machine has {have} CUDA devices")
    return torch.device("cuda", index)
