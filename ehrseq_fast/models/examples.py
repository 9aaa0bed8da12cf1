"""Arguments on which :mod:`~ehrseq_fast.models.comparison` runs models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LENGTHS = (2, 4, 3)
CODES = 32
LONG = 600  # visits, and codes of a visit: more than most models cut records to
_WORK = 10**9  # products of visits and weights of a layer: a large one reads fewer visits


def inputs_of(form: str, twin: Any, dtype: torch.dtype, weight: float = 1.0) -> tuple[Any, ...]:
    """Arguments whose padded slots hold numbers too, and whose padded visits codes; with masks of
    a dtype, and of codes that weigh up to ``weight``."""
    generator = torch.Generator("cpu").manual_seed(1)
    patients, visits = len(_LENGTHS), max(_LENGTHS)
    shape = (patients, visits, CODES)
    real = torch.rand(shape, generator=generator) < 0.5
    aggregation = getattr(getattr(twin, "visit_encoder", twin), "aggregation", "mean")
    if aggregation in ("max", "attention"):
        real[..., 1] = True  # a visit without a code is -inf or NaN to some, and zeros here
    else:
        real[0, 1] = False
    visit_mask = real.to(dtype)
    if weight != 1:
        visit_mask = visit_mask * weight * torch.rand(shape, generator=generator)
    if form == "encoder":
        parameter = next(twin.parameters(), None)
        width = 6 if parameter is None else parameter.shape[-1]
        embeddings = torch.randn(
            patients * visits, CODES, width, dtype=torch.float64, generator=generator
        )
        return embeddings.requires_grad_(), visit_mask.flatten(0, 1)
    is_visit = torch.arange(visits) < torch.tensor(_LENGTHS)[:, None]
    codes = torch.randint(len(twin.embedding.weight), shape, generator=generator)
    seen = real & is_visit.unsqueeze(-1)
    codes[seen] = first_and_last(len(twin.embedding.weight), int(seen.sum()))
    return _arguments(form, codes, visit_mask, is_visit.to(dtype), generator)


def long_inputs(form: str, twin: Any, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """A patient of visits with many codes, one with many visits, and two with one visit."""
    generator = torch.Generator("cpu").manual_seed(3)
    if form == "encoder":
        embeddings = inputs_of(form, twin, dtype)[0].detach()
        many = embeddings.flatten(0, 1).repeat(3, 1).unsqueeze(0)
        return [(many, torch.ones(many.shape[:2], dtype=dtype))]
    layer = sum(parameter.numel() for parameter in twin.lstm.parameters())
    found = []
    longest = min(LONG, _WORK // layer + 1)
    for patients, visits, width in ((1, 2, LONG), (1, longest, 1), (2, 1, 1)):
        shape = (patients, visits, width)
        codes = torch.randint(len(twin.embedding.weight), shape, generator=generator)
        masks = torch.ones(codes.shape, dtype=dtype), torch.ones(patients, visits, dtype=dtype)
        found.append(_arguments(form, codes, *masks, generator))
    return found


def _arguments(
    form: str, codes: Tensor, visit_mask: Tensor, sequence_mask: Tensor, generator: torch.Generator
) -> tuple[Any, ...]:
    if form == "with_time":
        shape = (*codes.shape[:2], 3)
        features = torch.randn(shape, dtype=torch.float64, generator=generator)
        return codes, visit_mask, sequence_mask, features
    inputs = (codes, visit_mask, sequence_mask)
    return (*inputs, True) if form == "baseline" else inputs


def with_padding(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """With a visit more of padding for each patient."""
    return tuple(
        torch.cat([value, torch.zeros_like(value[:, :1])], 1)
        if isinstance(value, Tensor)
        else value
        for value in inputs
    )


def without(inputs: tuple[Any, ...], lacking: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(None if place in lacking else value for place, value in enumerate(inputs))


def in_32_bits(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """As most models are run: where an argument is left out, some make one in float32."""
    is_double = [isinstance(value, Tensor) and value.dtype == torch.float64 for value in inputs]
    return tuple(v.float() if double else v for v, double in zip(inputs, is_double, strict=True))


def first_and_last(rows: int, n: int) -> Tensor:
    """n codes of ``rows``, the first and the last of them in turns."""
    half = torch.arange((n + 1) // 2) % rows
    return torch.stack([half, rows - 1 - half], 1).flatten()[:n]


def without_codes(
    form: str, inputs: tuple[Any, ...], padding: int | None = None
) -> list[tuple[Any, ...]]:
    """With visits that have no code: all of a patient's, another's first and another's last; and
    with none at all. ``padding`` is the code of a pool that makes its mask; without a mask every
    slot is a code."""
    if len(inputs) == 1 and padding is None:
        return []
    place = 0 if len(inputs) == 1 else 1
    some, none = inputs[place].clone(), inputs[place].clone()
    value = 0 if padding is None or place == 1 else padding
    none[:] = value
    if form == "encoder":
        some[::2] = value
    else:
        some[0], some[1, 0], some[-1, -1] = value, value, value
        if len(inputs) > 2:
            some[-1, int((inputs[2][-1] != 0).sum()) - 1] = value
    return [(*inputs[:place], mask, *inputs[place + 1 :]) for mask in (some, none)]
