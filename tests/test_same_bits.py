"""A fused model's loss, predictions and gradients are the same bits for any number of threads, also
where OpenMP grants fewer threads than torch asks for."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch

from ehrseq_fast import PackedVisits
from ehrseq_fast.models import (
    CompetingRisksSurvivalLSTM,
    DiscreteTimeSurvivalLSTM,
    DiscreteTimeSurvivalLSTMWithTime,
    LSTMBaseline,
)

WIDTHS = {"embedding_dim": 24, "hidden_dim": 72}
MODELS = {
    "survival": lambda: DiscreteTimeSurvivalLSTM(900, **WIDTHS, num_layers=2),
    "bidirectional": lambda: DiscreteTimeSurvivalLSTM(900, **WIDTHS, bidirectional=True),
    "GRU": lambda: DiscreteTimeSurvivalLSTM(900, **WIDTHS, cell="gru"),
    "with time": lambda: DiscreteTimeSurvivalLSTMWithTime(900, **WIDTHS),
    "competing risks": lambda: CompetingRisksSurvivalLSTM(900, 2, **WIDTHS),
    **{
        f"baseline, {aggregation}": lambda aggregation=aggregation: LSTMBaseline(
            900, **WIDTHS, visit_aggregation=aggregation, output_dim=3
        )
        for aggregation in ("mean", "max", "attention")
    },
}


def batch_of(name: str, patients: int = 800, visits: int = 24) -> PackedVisits:
    """So many visits that PyTorch shares out its sums and elementwise operations."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, visits, (patients,), generator=generator).tolist()
    sizes = torch.randint(1, 5, (sum(lengths),), generator=generator).tolist()
    codes = torch.randint(1, 900, (sum(sizes),), generator=generator)
    visit = iter([part.tolist() for part in codes.split(sizes)])
    seen = "event_types" if name == "competing risks" else "event_indicators"
    features = torch.randn(sum(lengths), 3, generator=generator).split(lengths)
    return PackedVisits.from_lists(
        [[next(visit) for _ in range(n)] for n in lengths],
        event_times=[n - 1 for n in lengths],
        visit_features=[part.numpy() for part in features] if name == "with time" else None,
        targets={"labels": torch.rand(patients, 3, generator=generator).numpy()},
        vocab_size=900,
        **{seen: [i % 2 for i in range(patients)]},
    )


def everything(
    name: str, batch: PackedVisits, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    model.loss(batch).backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    loss = model.loss(batch)  # with other units dropped
    model.eval()
    with torch.no_grad():
        output = model(batch)
    predictions = output["logits"] if isinstance(output, dict) else output.values
    return {"loss": loss.detach(), "predictions": predictions, **gradients}


def digest(results: dict[str, torch.Tensor]) -> str:
    whole = b"".join(tensor.numpy().tobytes() for tensor in results.values())
    return hashlib.sha256(whole).hexdigest()


CASES = [
    *((name, torch.float32, False) for name in MODELS),
    *((name, torch.bfloat16, False) for name in ("survival", "with time")),
    ("survival", torch.float64, False),
    ("survival", torch.float32, True),
]


@pytest.mark.parametrize(("name", "dtype", "autocast"), CASES)
def test_whole_models_with_any_number_of_threads(compiled, name, dtype, autocast):
    batch = batch_of(name)
    before = torch.get_num_threads()
    try:
        first = None
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                results = everything(name, batch, dtype)
            first = first or results
            differing = [key for key in first if not torch.equal(first[key], results[key])]
            assert not differing, f"{threads} threads: {differing}"
    finally:
        torch.set_num_threads(before)


IN_A_PROCESS = """
from tests.test_same_bits import *
for name in ("survival", "with time", "baseline, attention"):
    print(digest(everything(name, batch_of(name, 150, 20))))
"""


def test_whole_models_in_any_environment(compiled):
    """OpenMP may grant fewer threads than torch believes it has."""
    environments = [
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "4", "OMP_THREAD_LIMIT": "1"},
        {"OMP_NUM_THREADS": "4", "OMP_DYNAMIC": "true"},
    ]
    seen = []
    for environment in environments:
        run = subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS],
            check=True,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        seen.append(run.stdout.split())
    assert len(seen[0]) == 3
    assert all(digests == seen[0] for digests in seen)
