"""The README's Python runs as printed, and its table is that of the committed results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import ehrseq_fast

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_snippets_run():
    visit_codes = torch.tensor([[[12, 7], [3, 0]], [[5, 0], [0, 0]]])
    old = ehrseq_fast.models.DiscreteTimeSurvivalLSTM(20)
    names = {
        "ehrseq_fast": ehrseq_fast,
        "vocab_size": 20,
        "old": old,
        "embedding": old.embedding,
        "visit_codes": visit_codes,
        "visit_mask": visit_codes != 0,
        "sequence_mask": (visit_codes != 0).any(2),
        "hazards": torch.rand(2, 2),
        "event_times": torch.tensor([1, 0]),
        "event_indicators": torch.tensor([1, 0]),
    }
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, names)
    assert names["visits"].shape == (2, 2, 128)
    assert names["hazard"].shape == (1,)


def test_the_figure_and_tables_are_those_of_the_newest_results():
    pytest.importorskip("duckdb")
    from benchmarks import readme

    for path, text in readme.texts().items():
        assert path.read_text() == text, "python -m benchmarks readme"


def test_every_operation_that_was_timed_is_on_the_page():
    """Those of the operations' section; modes, the step and growth have sections of their own."""
    from benchmarks import results

    path, found = results.newest()
    whole = {job.split(" (")[0] for job in ("training step", "parts of a training step")}
    timed = {
        row.operation
        for row in found.rows
        if row.workload not in ("every", "every mode")
        and row.operation not in whole
        and not row.operation.startswith(("growth ", "peak memory ", "one eager call"))
    }
    page = (path.parent / "cpu.md").read_text()
    assert {"visit pooling", "visit pooling, weights per code"} <= timed
    assert not [name for name in timed if f"| {name} (" not in page]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_charts_were_drawn_from_the_newest_results(device):
    from benchmarks import plot, results

    found = results.newest(device)
    if found is None:
        pytest.skip(f"no results on {device} yet")
    path, run = found
    for name in ("step", "operations", "growth"):
        image = plot.image_path(path, run, name)
        assert plot.digest(path).encode() in image.read_bytes(), "python -m benchmarks readme"
