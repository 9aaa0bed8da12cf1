"""Models trained one step, for processes of several environments to be compared bit by bit.

``python -m tests.environments FILE [check ...]`` runs the named checks in this process and saves
what they computed.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ehrseq_fast import PackedGRU, PackedVisits
from ehrseq_fast.models import (
    CompetingRisksSurvivalLSTM,
    DiscreteTimeSurvivalLSTM,
    DiscreteTimeSurvivalLSTMWithTime,
    LSTMBaseline,
    VisitEncoder,
)

VOCABULARY, EMBEDDING, HIDDEN = 300, 24, 50  # a width that leaves part of a vector unused
Found = dict[str, Tensor]


def make(name: str, path: str = "fused") -> torch.nn.Module:
    """A model with the weights that a seed gives, without dropout."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embedding_dim": EMBEDDING, "hidden_dim": HIDDEN, "path": path}
    models: dict[str, Callable[[], torch.nn.Module]] = {
        "survival": lambda: DiscreteTimeSurvivalLSTM(VOCABULARY, dropout=0.0, **sizes),
        "survival, 2 layers": lambda: DiscreteTimeSurvivalLSTM(
            VOCABULARY, num_layers=2, dropout=0.0, **sizes
        ),
        "survival, both directions": lambda: DiscreteTimeSurvivalLSTM(
            VOCABULARY, bidirectional=True, dropout=0.0, **sizes
        ),
        "survival, GRU": lambda: DiscreteTimeSurvivalLSTM(
            VOCABULARY, cell="gru", dropout=0.0, **sizes
        ),
        "with time": lambda: DiscreteTimeSurvivalLSTMWithTime(VOCABULARY, dropout=0.0, **sizes),
        "competing risks": lambda: CompetingRisksSurvivalLSTM(VOCABULARY, 3, dropout=0.0, **sizes),
        **{
            f"baseline, {how}": lambda how=how: LSTMBaseline(
                VOCABULARY, visit_aggregation=how, dropout=0.0, **sizes
            )
            for how in ("mean", "sum", "max", "attention")
        },
    }
    return models[name]()


# A bidirectional LSTM reads padding on the padded path, as its class says.
NAMES = (
    "survival",
    "survival, 2 layers",
    "survival, both directions",
    "survival, GRU",
    "with time",
    "competing risks",
    "baseline, mean",
    "baseline, sum",
    "baseline, max",
    "baseline, attention",
)


def make_batch(patients: int = 160, seed: int = 0) -> PackedVisits:
    """Enough visits for every loop to be shared among threads, long records among them."""
    random = np.random.default_rng(seed)
    lengths = np.minimum(random.geometric(0.12, patients), 60)
    lengths[0] = 60
    visits = [
        [random.integers(1, VOCABULARY, random.integers(0, 9)).tolist() for _ in range(n)]
        for n in lengths
    ]
    times = (random.random(patients) * lengths).astype(np.int64)
    return PackedVisits.from_lists(
        visits,
        vocab_size=VOCABULARY,
        event_times=times,
        event_indicators=random.integers(0, 2, patients),
        event_types=random.integers(0, 4, patients),
        visit_features=[random.standard_normal((n, 3)).astype(np.float32) for n in lengths],
        targets={"labels": random.integers(0, 2, patients).astype(np.float32)},
    )


def step(
    name: str,
    path: str = "fused",
    batch: PackedVisits | None = None,
    model: torch.nn.Module | None = None,
) -> Found:
    """The loss and every gradient, the embedding's among them."""
    model = make(name, path) if model is None else model
    batch = make_batch() if batch is None else batch
    if name != "with time":
        batch = without_features(batch)
    loss = model.loss(batch)  # type: ignore[operator]
    loss.backward()
    found = {f"{name}: loss": loss.detach()}
    for parameter, value in model.named_parameters():
        assert value.grad is not None, parameter
        found[f"{name}: {parameter}"] = value.grad
    return found


_bare: dict[int, PackedVisits] = {}


def without_features(batch: PackedVisits) -> PackedVisits:
    """The same patients for a model that takes no features of visits."""
    if batch.visit_features is None:
        return batch
    codes = [[row.tolist() for row in _codes_of(batch, patient)] for patient in range(len(batch))]
    key = id(batch)
    if key not in _bare:
        _bare[key] = PackedVisits.from_lists(
            codes,
            vocab_size=VOCABULARY,
            event_times=batch.event_times,
            event_indicators=batch.event_indicators,
            event_types=batch.event_types,
            targets=dict(batch.targets),
        )
    return _bare[key]


def _codes_of(batch: PackedVisits, patient: int) -> list[Tensor]:
    return [
        batch.codes[batch.code_offsets[row] : batch.code_offsets[row + 1]]
        for row in batch.rows_of(patient).tolist()
    ]


def every_model(path: str = "fused") -> Found:
    batch = make_batch()
    return {k: v for name in NAMES for k, v in step(name, path, batch).items()}


# Checks -------------------------------------------------------------------------------------------


def plain() -> Found:
    return every_model()


def refused_paths() -> dict[str, list[str]]:
    """What PyTorch's own LSTM says on the paths that run it, with oneDNN and without."""
    batch, said = without_features(make_batch()), {}
    for path in ("packed", "padded"):
        said[path] = []
        for enabled in (True, False):
            torch.backends.mkldnn.enabled = enabled
            try:
                step("survival", path, batch)
                said[path].append("")
            except RuntimeError as error:
                said[path].append(str(error))
            finally:
                torch.backends.mkldnn.enabled = True
    return said


def refused_bfloat16() -> dict[str, str]:
    """What is said where PyTorch's own products of bfloat16 would run, by what runs them."""
    batch, dtype = without_features(make_batch()), torch.bfloat16

    def hooked(model: torch.nn.Module, name: str) -> torch.nn.Module:
        model.get_submodule(name).register_forward_hook(lambda *_: None)
        return model

    def with_gru() -> torch.nn.Module:
        model = make("survival")
        model.lstm = torch.nn.GRU(EMBEDDING, HIDDEN, batch_first=True)
        return model

    rows = torch.randn(200, 8, EMBEDDING, dtype=dtype)
    encoder = VisitEncoder(EMBEDDING, "attention").to(dtype).eval()
    padded = torch.randn(4, 30, EMBEDDING, dtype=dtype)
    calls: dict[str, Callable[[], Any]] = {
        "encoder": lambda: encoder(rows),
        "hooked head": lambda: hooked(make("survival"), "hazard_head").to(dtype)(batch),
        "hooked fc": lambda: hooked(make("baseline, mean"), "fc").to(dtype)(batch),
        "hooked attention": lambda: hooked(
            make("baseline, attention"), "visit_encoder.attention.0"
        ).to(dtype)(batch),
        "padded head": lambda: make("baseline, mean", "padded").to(dtype)(batch),
        "GRU in place": lambda: with_gru().to(dtype)(batch),
        "PackedGRU, padded": lambda: PackedGRU(EMBEDDING, HIDDEN).to(dtype)(padded),
        "fused": lambda: make("survival").to(dtype)(batch),  # the package's own kernels
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
            said[name] = ""
        except RuntimeError as error:
            said[name] = str(error)
    return said


def plain_paths() -> dict[str, Found]:
    """PyTorch's own LSTM, without oneDNN; models of one direction, whose paths agree."""
    torch.backends.mkldnn.enabled = False
    batch, names = make_batch(), [name for name in NAMES if "directions" not in name]
    return {
        path: {k: v for name in names for k, v in step(name, path, batch).items()}
        for path in ("packed", "padded")
    }


def threads() -> dict[str, Found]:
    found = {}
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        found[f"{count} threads"] = every_model()
    return found


def _send(connection: Any) -> None:
    connection.send({k: v.numpy() for k, v in step("survival").items()})
    connection.close()


def _from_process(method: str) -> Found:
    context: Any = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender,))
    process.start()
    if not receiver.poll(120):
        process.kill()
        raise RuntimeError(f"a process started by {method} did not answer")
    found = {k: torch.from_numpy(v) for k, v in receiver.recv().items()}
    process.join()
    return found


def forked() -> Found:
    """After the parent has computed on one thread: OpenMP's threads do not survive a fork, which
    PyTorch leaves to its user."""
    torch.set_num_threads(1)
    step("survival")
    return _from_process("fork")


def spawned() -> Found:
    return _from_process("spawn")


def ten_threads() -> dict[str, Found]:
    """Ten Python threads at once, each with a model of its own and one batch for all."""
    batch, found, errors = make_batch(), {}, []
    models = [make("survival") for _ in range(10)]  # one after the other: they share a generator

    def work(at: int) -> None:
        try:
            found[f"Python thread {at}"] = step("survival", "fused", batch, models[at])
        except Exception as error:
            errors.append(error)

    without_features(batch)
    for run in [threading.Thread(target=work, args=(at,)) for at in range(10)]:
        run.start()
        found[run.name] = run  # type: ignore[assignment]
    for name in [name for name, run in found.items() if isinstance(run, threading.Thread)]:
        found.pop(name).join()  # type: ignore[attr-defined]
    if errors:
        raise errors[0]
    return found


CHECKS: dict[str, Callable[[], Any]] = {
    check.__name__: check
    for check in (
        plain,
        refused_paths,
        refused_bfloat16,
        plain_paths,
        threads,
        forked,
        spawned,
        ten_threads,
    )
}


def main(path: str, names: list[str]) -> None:
    torch.save({name: CHECKS[name]() for name in names}, path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # without waiting for what a library's threads do at exit
