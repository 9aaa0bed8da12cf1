"""What all losses of survival refuse, each of them and on every backend: impossible outcomes,
negative weights, and hazards that no probability is. Never a NaN of what is read, which shows."""

from __future__ import annotations

import math

import pytest
import torch

from ehrseq_fast import (
    PackedRows,
    PackedVisits,
    competing_risks_nll,
    deephit_competing_ranking_loss,
    deephit_ranking_loss,
    discrete_time_survival_nll,
    piecewise_hazard_nll,
    pmf_competing_risks_nll,
    pmf_nll,
)

pytestmark = pytest.mark.operation("survival_nll")

LOSSES = {  # and how many causes
    "survival": (discrete_time_survival_nll, None),
    "competing": (competing_risks_nll, 2),
    "pmf": (pmf_nll, None),
    "pmf competing": (pmf_competing_risks_nll, 2),
    "ranking": (deephit_ranking_loss, None),
    "competing ranking": (deephit_competing_ranking_loss, 2),
    "piecewise": (piecewise_hazard_nll, None),
}
FAULTS = {
    "negative weight": (
        {"sample_weight": torch.tensor([0.0, 1.0, -2.0, -1.0])},
        r"sample_weight must not be negative: patient 2 has -2 \(patients at fault: 2\)"),
    "infinitely negative": (
        {"sample_weight": torch.tensor([1.0, -math.inf, 0.0, math.nan])},
        r"sample_weight must not be negative: patient 1 has -inf \(patients at fault: 1\)"),
    "negative whole weight": (
        {"sample_weight": torch.tensor([1, 1, 1, -3])},
        r"sample_weight must not be negative: patient 3 has -3 \(patients at fault: 1\)"),
    "entry after the event": (
        {"entry_times": torch.tensor([0, 1, 2, 2])},
        r"entry_times must .* patient 2 has entry time 2 and event time 1 \(patients at fault: 2"),
    "type above K": (
        {"event_types": torch.tensor([0, 1, 1, 3])},
        r" must be 0 \(censored\) or .*: patient 3 has 3 \(patients at fault: 1\)"),
}  # fmt: skip


def call(name, packed=False, **change):
    loss, causes = LOSSES[name]
    torch.manual_seed(0)
    values = torch.rand(4, 3, *((causes,) if causes else ()))
    types = change.pop("event_types", torch.tensor([0, 1, 1, 0]))
    given = {"event_times": torch.tensor([2, 1, 1, 0])}
    given["event_types" if causes else "event_indicators"] = types
    given |= change
    device = torch.get_default_device()
    given = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in given.items()
    }
    if packed:
        batch = PackedVisits.from_lists([[[1]] * 3] * 4).to(torch.get_default_device())
        values = PackedRows(batch.pack(values), batch)
    return loss(values, **given)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_first_patient_at_fault_is_named(backend, name, fault):
    change, message = FAULTS[fault]
    for packed in (False, True):
        call(name, packed, validate=True)
        with pytest.raises(ValueError, match=message):
            call(name, packed, validate=True, **change)


@pytest.mark.parametrize("name", LOSSES)
def test_other_weights_show(backend, name):
    more = {} if "ranking" in name else {"reduction": "none"}
    for weight in (math.nan, math.inf):
        loss = call(name, sample_weight=torch.tensor([1.0, weight, 1.0, 1.0]), **more)
        wrong = ~loss.isfinite()
        assert wrong.tolist() == ([False, True, False, False] if more else True)


@pytest.mark.parametrize("censored_visit", ["excluded", "included"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causes", [None, 2])
def test_hazards_outside_the_probabilities(backend, causes, dtype, censored_visit):
    """At a visit that is read, whichever: no other is looked at. A NaN is no fault."""
    loss = competing_risks_nll if causes else discrete_time_survival_nll
    torch.manual_seed(0)
    slots = 35  # more than one vector, and a rest
    hazards = torch.rand(9, slots, causes or 1).clamp(0.01, 0.9).to(dtype)
    times = torch.tensor([34, 33, 20, 3, 0, 34, 17, 16, 15])
    types = torch.tensor([1, 0, 2 if causes else 1, 0, 1, 0, 1, 1, 0])
    entries = times // 3
    mask = torch.arange(slots) < (times + 1)[:, None]
    visit = torch.arange(slots)
    read = (visit >= entries[:, None]) & (visit < times[:, None])
    read = read[..., None].expand(hazards.shape).clone()
    for patient, (time, kind) in enumerate(zip(times.tolist(), types.tolist(), strict=True)):
        if censored_visit == "included":
            read[patient, time] = True
        if kind:
            read[patient, time, kind - 1] = True
    batch = PackedVisits.from_lists([[[1]] * (t + 1) for t in times.tolist()]).to(
        torch.get_default_device()
    )
    names = ("event_times", "event_types" if causes else "event_indicators")
    given = {**dict(zip(names, (times, types), strict=True)), "entry_times": entries}
    given |= {"censored_visit": censored_visit, "validate": True}

    def both(values):
        values = values if causes else values[..., 0]
        for packed in (False, True):
            rows = PackedRows(batch.pack(values), batch) if packed else values
            yield lambda rows=rows, packed=packed: loss(
                rows, **given, sequence_mask=None if packed else mask
            )

    ends = torch.where(read, 0.0, -7.0)
    ends[::2] = torch.where(read, 1.0, math.inf)[::2]
    for run in both(ends.to(dtype)):  # the ends are probabilities
        run()
    for wrong, text in ((1.5, "1.5"), (-0.5, "-0.5"), (math.inf, "inf"), (-math.inf, "-inf")):
        at = tuple(read.nonzero()[int(torch.randint(int(read.sum()), ()))].tolist())
        broken = torch.where(read, hazards, wrong)
        last = torch.tensor([8, int(times[8]) - 1, 0]).tolist()
        broken[at] = broken[tuple(last)] = wrong
        faults = len({at[0], 8})
        message = (
            rf"hazards must be in \[0, 1\] with from_logits=False: patient {at[0]} has {text} "
            rf"at visit {at[1]} \(patients at fault: {faults}\)"
        )
        for run in both(broken):
            with pytest.raises(ValueError, match=message):
                run()
    hidden = torch.where(read, hazards, math.nan)
    for run in both(hidden):
        assert run().isfinite()
    hidden[tuple(last)] = math.nan
    for run in both(hidden):
        assert run().isnan()


def test_logits_may_be_any_numbers(backend):
    given = (torch.full((1, 2), -7.0), torch.tensor([1]), torch.tensor([1]))
    for link in ("sigmoid", "cloglog"):
        loss = discrete_time_survival_nll(*given, from_logits=True, link=link, validate=True)
        assert loss.isfinite()
