"""Patients whose event may come within a horizon of a visit, as tests draw them."""

from __future__ import annotations

import torch

from ehrseq_fast import PackedRows, PackedVisits

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS = ("mean", "sum", "none")
AXES = ("visits", "days", "days in any order")


def draw(patients, slots, axis="visits", dtype=torch.float32, scale=2.0, seed=0):
    """Logits, a mask, what else the loss takes, and weights."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    lengths = (uniform(patients) * (slots + 1)).long().clamp(max=slots)
    lengths[:1] = slots
    x = torch.randn(patients, slots, generator=generator, dtype=torch.float64) * scale
    seen = (uniform(patients) < 0.5).long()
    if axis == "visits":
        given = {"event_times": (uniform(patients) * (slots + 3)).long(), "horizon": 3}
    else:
        days = (uniform(patients, slots) * 40).round().cumsum(1)
        if axis != "days":
            days = days.flip(1)
        last = (uniform(patients) * slots).long().clamp(max=slots - 1)
        times = days.gather(1, last[:, None]).squeeze(1)  # some at a visit, some between them
        times = times + torch.where(uniform(patients) < 0.5, 0.0, 5.5)
        given = {"event_times": times, "visit_times": days, "horizon": 60.0}
    weights = {"visit_weight": uniform(patients, slots), "sample_weight": uniform(patients)}
    mask = torch.arange(slots) < lengths[:, None]
    return x.to(dtype), mask, {**given, "event_indicators": seen}, weights


def packed_of(x, mask, **outcomes):
    batch = PackedVisits.from_lists([[[1]] * n for n in mask.sum(1).tolist()], **outcomes)
    batch = batch.to(x.device)
    return PackedRows(batch.pack(x), batch)
