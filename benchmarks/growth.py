"""How the training step grows: with real codes (a straight line), and with padding alone (flat)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from ehrseq_fast import PackedVisits

from .cases import Case, Missing, Row, Tensors, Variant, by_default, fits, our_backends
from .devices import Device
from .jobs import Benchmark, Job, Session, Settings, say
from .report import curve_text
from .results import Curve, Results
from .step import ModelSize, TrainingStep, model_size, padded_bytes
from .targets import Figure, Target, at_most
from .workloads import WORKLOADS, Batch

SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
BATCH_SIZES = (64, 128, 256, 512, 1024)
CODES, PADDING, PATIENTS = "real codes, padding fixed", "padding, real codes fixed", "patients"
UNITS = {CODES: "codes", PADDING: "slots", PATIENTS: "visits"}
PATHS = ("padded", "fused from padded", "fused")
AT = " @ "
LOSS_RTOL = 1e-5
LEAST_R_SQUARED = 0.99
MOST_CHANGE = 0.05


def operation(grows: str) -> str:
    return f"growth of the step with {grows}"


def fit(grows: str, rows: Sequence[Row]) -> list[Curve]:
    """The curves of one measured case, one per path with two points or more."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.seconds is not None:
            path, at = row.variant.split(AT)
            points.setdefault(path, []).append((float(at), row.median))
    curves = []
    for path, found in points.items():
        if len(found) < 2:
            continue
        x, y = (np.array(values) for values in zip(*found, strict=True))
        flat = np.ptp(y) == 0 or np.ptp(x) == 0
        slope, start = (0.0, float(y.mean())) if flat else np.polyfit(x, y, 1)
        left = y - (slope * x + start)
        explained = 1.0 if flat else 1 - float((left**2).sum() / ((y - y.mean()) ** 2).sum())
        curves.append(
            Curve(
                rows[0].workload,
                grows,
                path,
                UNITS[grows],
                x.tolist(),
                y.tolist(),
                float(slope),
                float(start),
                explained,
            )
        )
    return curves


def real_codes(batch: Batch, device: Device, size: ModelSize, backend: str | None) -> Case:
    """The first share of every patient's visits, padded all the same to the whole batch's shape."""
    parts = {}
    for share in SHARES:
        part = thinned(batch, share)
        parts[part.packed.n_codes] = part
    return _case(CODES, batch, parts, PATHS, device, size, backend)


def padding(batch: Batch, device: Device, size: ModelSize, backend: str | None) -> Case:
    """The same records in twice the code slots, then in twice the visits too.

    A packed batch has no padding to grow; the drop-in on padded tensors has to look through it.
    """
    wider = {
        batch.padded.visit_codes.numel(): batch,
        2 * batch.padded.visit_codes.numel(): widened(batch, visits=1, codes=2),
        4 * batch.padded.visit_codes.numel(): widened(batch, visits=2, codes=2),
    }
    return _case(PADDING, batch, wider, PATHS, device, size, backend)


def patients(
    letter: str, device: Device, size: ModelSize, sizes: Sequence[int], backend: str | None
) -> Case:
    """Ever larger batches of the same records."""
    batches = [WORKLOADS[letter].batch(count).to(device.name) for count in sizes]
    larger = {batch.packed.n_visits: batch for batch in batches}
    return _case(PATIENTS, batches[-1], larger, ("fused",), device, size, backend)


def _case(
    grows: str,
    batch: Batch,
    batches: dict[int, Batch],
    paths: Sequence[str],
    device: Device,
    size: ModelSize,
    backend: str | None,
) -> Case:
    """Steps of every path on every batch, once their losses were found equal batch by batch."""
    steps = {path: TrainingStep(path, size, device=device.name) for path in paths}
    for each in batches.values():
        _check_losses(steps, each, device)
    chosen = our_backends("packed_visit_pool", device.name, torch.float32, backend)[0]

    def variants() -> Iterator[tuple[str, Variant | Missing]]:
        for at, each in batches.items():
            for path, step in steps.items():
                name = f"{path}{AT}{at}"
                if path == "padded":
                    if at <= 2 * min(batches) or grows != PADDING:  # two points show it
                        left_out = fits(padded_bytes(each, size), device)
                        yield (
                            name,
                            left_out
                            or Variant(_once(step, each), compared=False, after_others=True),
                        )
                else:
                    ours = Variant(_once(step, each), backend=chosen, ours=True, compared=False)
                    own = device.name == "cuda" and backend is None
                    yield name, by_default(ours) if own else ours

    return Case(
        operation(grows), batch.workload, batch.patients, "step", "float32", dict(variants()), 0.0
    )


def _once(step: TrainingStep, batch: Batch) -> Any:
    def run() -> Tensors:
        step(batch)
        return ()

    return run


@torch.no_grad()
def _check_losses(steps: dict[str, TrainingStep], batch: Batch, device: Device) -> None:
    losses = {}
    for path, step in steps.items():
        if path != "padded" or fits(padded_bytes(batch, ModelSize(1)), device) is None:
            losses[path] = float(step.forward(batch))
    if max(losses.values()) - min(losses.values()) > LOSS_RTOL * abs(max(losses.values())):
        raise AssertionError(f"losses of the paths: expected equal ones, got {losses}")


def thinned(batch: Batch, share: float) -> Batch:
    """That share of every patient's visits, the first ones and at least one; the shape stays."""
    padded = batch.padded
    place = torch.arange(padded.sequence_mask.shape[1], device=padded.sequence_mask.device)
    lengths = (padded.sequence_mask.sum(1) * share).ceil().long()
    kept = place < lengths[:, None]
    smaller = padded._replace(
        visit_codes=padded.visit_codes * kept.unsqueeze(-1),
        visit_mask=padded.visit_mask & kept.unsqueeze(-1),
        sequence_mask=kept,
        event_times=lengths - 1,
    )
    packed = PackedVisits.from_padded(
        *smaller[:3],
        vocab_size=batch.vocabulary,
        event_times=smaller.event_times,
        event_indicators=smaller.event_indicators,
    )
    return Batch(batch.workload, smaller, packed, batch.vocabulary)


def widened(batch: Batch, *, visits: int, codes: int) -> Batch:
    """So many times the visits and codes per visit, all of the new ones padding."""
    padded = batch.padded
    _, v, c = padded.visit_codes.shape
    more_visits, more_codes = (visits - 1) * v, (codes - 1) * c
    wider = padded._replace(
        visit_codes=pad(padded.visit_codes, (0, more_codes, 0, more_visits)),
        visit_mask=pad(padded.visit_mask, (0, more_codes, 0, more_visits)),
        sequence_mask=pad(padded.sequence_mask, (0, more_visits)),
        time_features=pad(padded.time_features, (0, 0, 0, more_visits)),
    )
    return Batch(batch.workload, wider, batch.packed, batch.vocabulary)


def jobs(settings: Settings) -> Iterator[Job]:
    main = settings.main_workload

    def job(grows: str, weight: float, make: Callable[[Session], Case]) -> Job:
        def run(session: Session, budget_s: float) -> list[Row]:
            rows = session.measure(make(session), budget_s)
            curves = fit(grows, rows)
            session.curves += curves
            say(f"\n{curve_text(grows, curves)}")
            return rows

        return Job(f"growth with {grows}", weight, run, for_target=grows != PATIENTS)

    def of_batch(make: Callable[..., Case], session: Session) -> Case:
        batch = session.batch(main)
        return make(batch, session.device, model_size(batch.vocabulary, settings), settings.backend)

    def of_sizes(session: Session) -> Case:
        sizes = (8, 16, 24) if settings.quick else BATCH_SIZES
        model = model_size(session.batch(main, sizes[0]).vocabulary, settings)
        return patients(main, session.device, model, sizes, settings.backend)

    yield job(CODES, 35, partial(of_batch, real_codes))
    yield job(PADDING, 25, partial(of_batch, padding))
    yield job(PATIENTS, 15, of_sizes)


def _curves(results: Results, grows: str) -> dict[str, Curve]:
    found = {curve.path: curve for curve in results.curves if curve.grows == grows}
    if not found:
        raise KeyError(f"growth with {grows}")
    return found


def _linear(results: Results) -> Figure:
    r_squared = _curves(results, CODES)["fused"].r_squared
    return Figure(r_squared, LEAST_R_SQUARED, True, f"R² {r_squared:.4f}")


def _flat(results: Results) -> Figure:
    change = _curves(results, PADDING)["fused from padded"].doubled
    return at_most(change, MOST_CHANGE, f"{change:+.1%}")


BENCHMARK = Benchmark(
    jobs={"growth": jobs},
    targets=(
        Target(
            "all",
            "growth with real codes, padding fixed: linear",
            "R² ≥ 0.99",
            _linear,
            "the points scatter by more than the line leaves out; see their quartiles in the "
            "results",
        ),
        Target(
            "all",
            "growth with padding, doubled, real codes fixed",
            "< 5 %",
            _flat,
            "measured on the drop-in, which has to look through the masks that it is given; a "
            "packed batch has no padding that could grow",
        ),
    ),
)
