"""The benchmarks' workloads: the published statistics, and batches that say what is real."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import growth, workloads


@pytest.fixture(scope="module")
def batch():
    return workloads.WORKLOADS["A"].batch(8)


@pytest.mark.parametrize(
    ("population", "visits", "most_visits", "codes", "most_codes"),
    [
        (workloads.OUTPATIENT, 53.8, 500, 2.5, 62),
        (workloads.INPATIENT, 2.66, 42, 13.0, 39),
        (workloads.INPATIENT_RICH, 1.29, 15, 98.0, 834),
        (workloads.LONG, 137.0, 600, 45.0, 200),
    ],
    ids=["outpatient", "inpatient", "inpatient_rich", "long"],
)
def test_populations_have_the_published_statistics(
    population, visits, most_visits, codes, most_codes
):
    records = population.records(2000 if visits < 100 else 400, seed=3)
    lengths, widths = records.visits_per_patient, records.codes_per_visit
    error = 4 / np.sqrt(len(lengths))
    assert lengths.mean() == pytest.approx(visits, rel=error)
    assert widths.mean() == pytest.approx(codes, rel=0.1)
    assert 0.35 * most_visits <= lengths.max() <= most_visits
    assert 0.6 * most_codes <= widths.max() <= most_codes
    assert lengths.min() >= population.visits.least
    assert records.codes.min() >= 1
    assert 0.9 * population.vocabulary < records.codes.max() < population.vocabulary
    assert (records.event_times == lengths - 1).all()
    assert records.event_indicators.mean() == pytest.approx(0.3, abs=0.1)


def test_capped_records_are_cut_off_at_the_limits():
    whole, capped = (p.records(200, seed=1) for p in (workloads.LONG, workloads.CAPPED))
    assert (capped.visits_per_patient == whole.visits_per_patient.clip(max=100)).all()
    assert capped.codes_per_visit.max() == 50


def test_codes_follow_zipfs_law_and_are_distinct_within_a_visit():
    random = np.random.default_rng(0)
    widths = np.full(20_000, 3)
    codes = workloads.zipf_codes(random, widths, 1000).reshape(-1, 3)
    assert (np.diff(codes, axis=1) > 0).all()
    counts = np.sort(np.bincount(codes.ravel(), minlength=1000))[::-1]
    ranks = np.arange(10, 300)
    slope = np.polyfit(np.log(ranks + 1), np.log(counts[ranks]), 1)[0]
    assert slope == pytest.approx(-1, abs=0.1)


def test_more_codes_than_are_popular_can_still_be_drawn():
    codes = workloads.zipf_codes(np.random.default_rng(0), np.array([99, 50]), 100)
    assert codes[:99].tolist() == list(range(1, 100))


def test_the_same_seed_gives_the_same_records():
    first, again, other = (workloads.OUTPATIENT.records(20, seed=seed) for seed in (5, 5, 6))
    assert (first.codes == again.codes).all()
    assert first.codes.shape != other.codes.shape or (first.codes != other.codes).any()


def test_workloads_span_the_batch_sizes_and_say_what_is_real():
    sizes = [size for w in workloads.WORKLOADS.values() for size in w.patients.values()]
    assert min(sizes) <= 32
    assert max(sizes) == 4096
    batch = workloads.WORKLOADS["B"].batch("small")
    facts = batch.facts()
    assert facts["shape"][0] == facts["patients"] == 32
    assert facts["real_codes"] == pytest.approx(batch.packed.n_codes / np.prod(facts["shape"]))
    assert f"{facts['real_visits']:.1%} of the visits" in str(batch)
    padded, packed = batch.padded, batch.packed
    assert torch.equal(packed.to_padded()[0], padded.visit_codes)
    assert torch.equal(packed.event_times, padded.event_times)


def test_thinning_keeps_the_padding_and_widening_the_codes(batch):
    half, wider = growth.thinned(batch, 0.5), growth.widened(batch, visits=2, codes=2)
    assert half.padded.visit_codes.shape == batch.padded.visit_codes.shape
    assert 0.4 < half.packed.n_visits / batch.packed.n_visits < 0.7
    assert torch.equal(half.packed.event_times, half.packed.lengths - 1)
    assert growth.thinned(batch, 1.0).packed.n_codes == batch.packed.n_codes
    assert wider.padded.visit_codes.numel() == 4 * batch.padded.visit_codes.numel()
    assert wider.packed is batch.packed
