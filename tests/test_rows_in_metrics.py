"""Metrics take rows, and their batch in the place of the outcomes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ehrseq_fast import PackedRows, PackedVisits, metrics


def rows(*trailing):
    random = np.random.default_rng(0)
    lengths = random.integers(1, 8, 60)
    times = (random.random(60) * lengths).astype(int)
    batch = PackedVisits.from_lists(
        [[[1]] * n for n in lengths],
        event_times=times,
        event_indicators=random.integers(0, 2, 60),
        event_types=random.integers(0, 3, 60),
    )
    values = random.random((batch.n_visits, *trailing)) / 4
    return PackedRows(torch.from_numpy(values), batch)


AT = {"landmark": 1, "horizon": 2}
OF_INDICATORS = {
    "concordance_index": ((), metrics.concordance_index, {}),
    "concordance_td": ((), metrics.concordance_td, {}),
    "landmark_auc": ((), metrics.landmark_auc, AT),
    "brier": ((), metrics.brier, AT),
    "integrated_brier": ((2,), metrics.integrated_brier, {"landmark": 1, "horizons": [1, 2]}),
    "calibration": (
        (),
        lambda *a, **k: metrics.calibration(*a, **k).mean_observed,
        AT | {"groups": 3},
    ),
    "evaluate": ((), lambda *a, **k: metrics.evaluate(*a, **k)["c_td"].model, {}),
}
OF_TYPES = {
    "concordance_td": ((2,), metrics.concordance_td, {"cause": 1}),
    "landmark_auc": ((), metrics.landmark_auc, AT | {"cause": 2}),
    "incidence_curves": (
        (2,),
        lambda *a, **k: float(np.sum(metrics.incidence_curves(*a, **k).observed)),
        {},
    ),
}
CASES = [
    pytest.param(*case, names, id=f"{name}, {names}")
    for cases, names in ((OF_INDICATORS, "event_indicators"), (OF_TYPES, "event_types"))
    for name, case in cases.items()
]


@pytest.mark.parametrize(("trailing", "metric", "options", "names"), CASES)
def test_rows_with_their_batch(trailing, metric, options, names):
    ours = rows(*trailing)
    batch = ours.batch
    outcomes = {"event_times": batch.event_times, names: getattr(batch, names)}
    expected = metric(ours, **outcomes, **options)
    assert np.isfinite(expected)
    assert metric(ours, **options) == expected
    assert metric(ours, batch, **options) == expected
    reverse = batch.lengths - 1 - batch.event_times
    changed = batch.with_outcomes(event_times=reverse)
    with_others = metric(PackedRows(ours.values, changed), **options)
    assert with_others != expected
    assert metric(ours, changed, **options) == with_others
    with pytest.raises(ValueError, match="event_times: expected the batch of the PackedRows in"):
        metric(ours, batch[:], **options)
    with pytest.raises(TypeError, match="event_times: expected a tensor beside a tensor of"):
        metric(ours.to_padded(), batch, **options)
