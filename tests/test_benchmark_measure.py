"""The one engine that all benchmarks measure with: equal first, then timed in
alternating blocks."""

from __future__ import annotations

import doctest
import re
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import cases, ceilings, devices, report
from benchmarks.cases import Case, Missing, Row, Variant
from benchmarks.devices import Timing
from benchmarks.timing import Spread


@pytest.fixture
def cpu():
    return devices.Cpu()


def comparison(variants, **options):
    return Case("an operation", "W", 4, "forward", "float32", variants, 1e-6, **options)


def gives(*values, pause=0.0, **kind):
    def run():
        time.sleep(pause)
        return [torch.tensor(value) for value in values]

    return Variant(run, **kind)


def measured(case, device, budget_s=0.2, **options):
    return {row.variant: row for row in cases.measure(case, device, budget_s, **options)}


def test_a_variant_of_another_curve_alternates_without_the_others(cpu):
    ran = []

    def noted(name, **kind):
        def run():
            ran.append(name)
            time.sleep(0.01)
            return [torch.tensor(1.0)]

        return Variant(run, **kind)

    heavy = noted("heavy", after_others=True)
    case = comparison({"first": noted("first"), "heavy": heavy, "last": noted("last")})
    rows = measured(case, cpu, budget_s=1.0)
    assert all(row.seconds.count > 1 for row in rows.values())
    since_others = ran[::-1].index("last")
    # all but those that told how long it takes; alternating with the others, the last few
    assert since_others > 0.7 * ran.count("heavy")


def test_a_timed_call_follows_one_of_the_same_variant(cpu):
    calls = []

    class Noting(devices.Cpu):
        def time(self, run, *, cold=False, warm_ups=0):
            calls.append("timed")
            return super().time(run, cold=cold, warm_ups=warm_ups)

    def noted(name):
        def run():
            calls.append(name)
            time.sleep(0.02)
            return [torch.tensor(1.0)]

        return Variant(run)

    rows = measured(comparison({name: noted(name) for name in "ab"}), Noting(), budget_s=1.0)
    assert all(row.seconds.count > 4 for row in rows.values())
    timed = [i for i, call in enumerate(calls) if call == "timed"]
    before = [next(c for c in calls[i - 1 :: -1] if c != "timed") for i in timed]
    assert before == [calls[i + 1] for i in timed]


def test_equal_variants_are_timed(cpu):
    rows = measured(comparison({"plain": gives(1.0, 2.0), "ours": gives(1.0, 2.0, ours=True)}), cpu)
    assert rows["plain"].seconds.count >= 3
    assert rows["ours"].difference == 0
    assert rows["ours"].host is None
    assert not rows["ours"].failed


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (
            gives(1.1),
            "AssertionError: max. relative difference: expected at most 1e-06, got 1.0e-01",
        ),
        (gives(float("nan")), "got inf"),
        (gives(1.0, 2.0), "results: expected 1, got 2"),
        (gives([1.0, 1.0]), r"shape of a result: expected \[\], got \[2\]"),
        (Variant(lambda: 1 / 0), "ZeroDivisionError"),
        (Missing("not installed"), "not installed"),
    ],
)
def test_wrong_variants_are_not_timed_and_say_why(cpu, wrong, reason):
    rows = measured(comparison({"plain": gives(1.0), "other": wrong}), cpu)
    assert rows["other"].seconds is None
    assert rows["plain"].seconds is not None
    assert re.search(reason, rows["other"].missing)
    assert not rows["other"].failed


def test_our_own_wrong_variant_is_a_failure(cpu):
    rows = measured(comparison({"plain": gives(1.0), "ours": gives(2.0, ours=True)}), cpu)
    assert rows["ours"].failed


def test_what_is_expected_may_be_given(cpu):
    expected = {"expected": lambda: [torch.tensor(1.0)]}
    rows = measured(comparison({"plain": gives(2.0), "ours": gives(1.0)}, **expected), cpu)
    assert "got 1.0e+00" in rows["plain"].missing
    assert rows["ours"].difference == 0


def test_without_time_nothing_runs(cpu):
    rows = measured(comparison({"a": gives(1.0, ours=True), "b": Missing("no GPU")}), cpu, 0.0)
    assert rows["a"].missing == "no time was left of the budget"
    assert not rows["a"].failed
    assert rows["b"].missing == "no GPU"


def test_too_slow_for_the_budget_is_timed_once_and_quick_ones_go_on(cpu):
    rows = measured(comparison({"slow": gives(1.0, pause=0.1), "quick": gives(1.0)}), cpu, 0.25)
    assert rows["slow"].seconds.count == 1
    assert rows["slow"].median >= 0.1
    assert rows["quick"].seconds.count > 5


def test_a_moment_without_the_machine_does_not_pass_for_a_slow_variant(cpu):
    pauses = iter([0.1, 0.4])

    def run():
        time.sleep(next(pauses, 0.1))
        return [torch.tensor(1.0)]

    rows = measured(comparison({"a": Variant(run)}), cpu, 0.6)
    assert 0.1 <= rows["a"].median < 0.2
    assert rows["a"].seconds.upper < 0.2


def test_many_calls_are_timed_together(cpu):
    rows = measured(comparison({"a": gives(1.0, pause=0.001)}, calls=10), cpu)
    assert 0.001 <= rows["a"].median < 0.009


def test_host_and_device_times_are_kept_apart_and_floors_added():
    class Gpu(devices.Cpu):
        def time(self, run, *, cold=False, warm_ups=0):
            run()
            return Timing(2e-3, 5e-6)

    found = ceilings.Ceilings(1e9, 1e9, {"float32": 1e12}, 1e-6, 1e-6, 2**20)
    work = ceilings.Work(bytes=1e6)
    rows = measured(comparison({"a": gives(1.0)}, work=work), Gpu(), ceilings=found)
    assert rows["a"].seconds.median == 2e-3
    assert rows["a"].host.median == 5e-6
    assert rows["a"].floor_s == pytest.approx(1e-3)
    text = report.case_table("title", list(rows.values()))
    assert "host us" in text
    assert "50%" in text


def test_tables_compare_with_our_first_way_and_name_what_is_missing():
    plain = Row("op", "W", 4, "forward", "float32", "warm", "plain")
    rows = [
        replace(plain, seconds=Spread(0.4, 0.4, 0.4, 3), difference=0.0),
        replace(plain, variant="ours", ours=True, seconds=Spread.of([1e-3]), difference=0.0),
        replace(plain, variant="absent", missing="not installed"),
    ]
    text = report.case_table("a title", rows)
    assert "400x" in text
    assert "1.00 .. 1.00" in text
    assert "not measured: absent: not installed" in text
    assert report.ours_in([replace(row, difference=None) for row in rows]) is None


def test_tables_and_numbers_are_as_their_examples_say():
    assert doctest.testmod(report) == (0, 2)
