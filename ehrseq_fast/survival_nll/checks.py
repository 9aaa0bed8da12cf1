"""What the survival losses refuse: wrong shapes, dtypes and devices, and impossible patients.

``check_tensors`` looks at metadata alone. ``check_outcomes`` reads values; the compiled CPU kernel
makes the same checks, in the same order and with the same words, while it computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arrays import expect_tensor
from ..autograd import transformed
from ..checks import FLOATING, INTEGER, REAL, expect_device, expect_option, zero_lengths
from .fused import Inputs
from .options import Options
from .reference import visits_at_risk


def require_outcomes(**outcomes: Tensor | None) -> tuple[Tensor, ...]:
    """Refuse outcomes that were left out: padded hazards hold none."""
    for name, tensor in outcomes.items():
        if tensor is None:
            raise TypeError(f"{name}: expected a tensor with padded hazards, got None")
    given: Any = tuple(outcomes.values())
    return given


def refuse_mask(sequence_mask: Tensor | None) -> None:
    """Packed rows are real visits alone."""
    if sequence_mask is not None:
        raise ValueError(
            "sequence_mask: expected None, as hazards are PackedRows, whose visits are all real, "
            "got a mask"
        )


def check_link(hazards: Tensor, link: str, from_logits: bool) -> None:
    """Refuse an unknown link, and hazards whose last dimension does not fit it."""
    expect_option("link", link, ("sigmoid", "softmax", "cloglog"))
    _expect_logits(link, from_logits)
    fewest = 2 if link == "softmax" else 1
    if hazards.shape[-1] < fewest:
        raise ValueError(
            f"hazards: expected at least {fewest} values per visit with link={link!r}, "
            f"got shape {list(hazards.shape)}"
        )


def fits_link(link: object, from_logits: bool, *others: str) -> bool:
    """Whether the link is one of ``sigmoid``, ``cloglog`` and ``others`` that may be asked for:
    without ``from_logits`` the first alone."""
    if not isinstance(link, str):
        return False
    return link == "sigmoid" or (from_logits and (link == "cloglog" or link in others))


def check_single_link(link: str, from_logits: bool) -> None:
    """Refuse an unknown link of one hazard per visit."""
    if type(link) is str and link == "sigmoid":
        return
    expect_option("link", link, ("sigmoid", "cloglog"))
    _expect_logits(link, from_logits)


def _expect_logits(link: str, from_logits: bool) -> None:
    if link != "sigmoid" and not from_logits:
        raise ValueError(f"from_logits: expected True with link={link!r}, got False")


def check_tensors(
    hazards: Tensor,
    layout: tuple[str, ...],
    event_times: Tensor,
    event_types: tuple[str, Tensor, frozenset[torch.dtype]],
    sequence_mask: Tensor | None,
    entry_times: Tensor | None,
    sample_weight: Tensor | None,
    name: str = "hazards",
) -> None:
    """Refuse tensors whose kind, dtype, shape or device does not fit ``hazards``, which errors call
    ``name``.

    ``layout`` names the dimensions of ``hazards``: ``("B", "V")`` or ``("B", "V", "K")``.
    """
    check_hazards(hazards, layout, name)
    check_companions(
        hazards, hazards.shape[0], event_times, event_types, entry_times, sample_weight, name
    )
    if sequence_mask is not None:
        of_mask = ("sequence_mask", sequence_mask, REAL, "a bool or numeric")
        check_companion(hazards, name, hazards.shape[:2], *of_mask)


def check_hazards(hazards: Tensor, layout: tuple[str, ...], name: str = "hazards") -> None:
    """Refuse hazards that are not a floating-point tensor of these dimensions."""
    if not isinstance(hazards, Tensor):
        expect_tensor(name, hazards)
    if hazards.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a floating-point dtype, got {hazards.dtype}")
    if hazards.dim() != len(layout):
        raise ValueError(f"{name}: expected shape [{', '.join(layout)}], got {list(hazards.shape)}")


def check_companions(
    hazards: Tensor,
    patients: int,
    event_times: Tensor,
    event_types: tuple[str, Tensor, frozenset[torch.dtype]],
    entry_times: Tensor | None,
    sample_weight: Tensor | None,
    name_of_hazards: str = "hazards",
) -> None:
    """Refuse what is known of each patient, where it does not fit ``hazards``."""
    shape = (patients,)
    check_companion(
        hazards, name_of_hazards, shape, "event_times", event_times, INTEGER, "an integer"
    )
    name, types, allowed = event_types
    kind = "a bool, integer or floating-point" if allowed is REAL else "an integer or bool"
    check_companion(hazards, name_of_hazards, shape, name, types, allowed, kind)
    check_entries_and_weights(hazards, patients, entry_times, sample_weight, name_of_hazards)


def check_entries_and_weights(
    hazards: Tensor,
    patients: int,
    entry_times: Tensor | None,
    sample_weight: Tensor | None,
    name_of_hazards: str = "hazards",
) -> None:
    """As :func:`check_companions`, beside outcomes that need no check."""
    shape = (patients,)
    if entry_times is not None:
        check_companion(
            hazards, name_of_hazards, shape, "entry_times", entry_times, INTEGER, "an integer"
        )
    if sample_weight is not None:
        check_companion(
            hazards, name_of_hazards, shape, "sample_weight", sample_weight, REAL, "a real"
        )
        learns = sample_weight.requires_grad and torch.is_grad_enabled()
        if learns and not transformed(hazards, sample_weight):
            raise ValueError(
                "sample_weight: expected no requires_grad, as the loss has a gradient for hazards "
                'alone; detach it, or weight the result of reduction="none" yourself'
            )


def check_column(
    hazards: Tensor,
    name: str,
    tensor: Tensor,
    dtypes: frozenset[torch.dtype],
    kind: str,
    patients: int,
) -> None:
    """Refuse anything but one number per patient, of these dtypes, beside logits ``hazards``."""
    check_companion(hazards, "logits", (patients,), name, tensor, dtypes, kind)


def check_companion(
    hazards: Tensor,
    name_of_hazards: str,
    shape: tuple[int, ...],
    name: str,
    tensor: Tensor,
    dtypes: frozenset[torch.dtype],
    kind: str,
    dims: tuple[str, ...] = ("B", "V"),
) -> None:
    """Refuse a tensor beside ``hazards`` that is on another device, or not of these dtypes and this
    shape, whose dimensions ``dims`` names."""
    if not isinstance(tensor, Tensor):
        expect_tensor(name, tensor)
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {kind} dtype, got {tensor.dtype}")
    if tensor.shape != shape:
        names = ", ".join(dims[: len(shape)])
        raise ValueError(
            f"{name}: expected shape [{names}] = {list(shape)} "
            f"for {name_of_hazards} {list(hazards.shape)}, got {list(tensor.shape)}"
        )
    if tensor.device != hazards.device:
        expect_device(name, tensor, hazards.device, name_of_hazards)


def check_outcomes(inputs: Inputs, link: str) -> None:
    """Refuse malformed masks, empty sequences, outcomes outside a patient's visits and negative
    weights, of padded hazards; nothing where a transform hides the values."""
    hazards, event_times, event_types, sequence_mask, entry_times, sample_weight = inputs
    if vmapped():
        return
    competing = hazards.dim() == 3
    slots = hazards.shape[1]
    causes = hazards.shape[2] - (link == "softmax") if competing else 1
    types_name = "event_types" if competing else "event_indicators"
    times, types = event_times.long(), event_types.double()
    visits = torch.full_like(times, slots)
    if sequence_mask is not None:
        check_mask(sequence_mask)
        visits = (sequence_mask != 0).sum(1)
    if (patient := _first(wrong := visits == 0)) is not None:
        raise zero_lengths(int(wrong.sum()), f"patient {patient}")
    if (patient := _first(wrong := (times < 0) | (times >= visits))) is not None:
        _refuse(
            "event_times must be one of the patient's visits, counted from 0",
            patient,
            f"event time {int(times[patient])} and {int(visits[patient])} visits",
            wrong,
        )
    if entry_times is not None:
        entries = entry_times.long()
        if (patient := _first(wrong := (entries < 0) | (entries > times))) is not None:
            _refuse(
                "entry_times must lie between 0 and the event time",
                patient,
                f"entry time {int(entries[patient])} and event time {int(times[patient])}",
                wrong,
            )
    exists = (types >= 0) & (types <= causes) & (types == types.floor())
    if (patient := _first(wrong := ~exists)) is not None:
        known = "1 (event)" if causes == 1 else f"a cause 1..{causes}"
        _refuse(
            f"{types_name} must be 0 (censored) or {known}",
            patient,
            f"{float(types[patient]):g}",
            wrong,
        )
    if sample_weight is not None:
        refuse_negative("sample_weight", sample_weight)


def refuse_negative(name: str, weight: Tensor) -> None:
    """Refuse weights of patients below 0. A NaN or an infinity is to reach the result."""
    if (patient := _first(wrong := weight < 0)) is not None:
        _refuse(f"{name} must not be negative", patient, f"{float(weight[patient]):g}", wrong)


def check_fraction(fraction: Tensor | None) -> None:
    """Refuse fractions outside [0, 1], NaN among them, after the outcomes have been checked."""
    if fraction is None or vmapped():
        return
    if (patient := _first(wrong := ~((fraction >= 0) & (fraction <= 1)))) is not None:
        _refuse("fraction must be in [0, 1]", patient, f"{float(fraction[patient]):g}", wrong)


def visits_read(inputs: Inputs, censored_included: bool) -> Tensor:
    """``[B, V]``: the visits that a loss reads, of padded hazards whose outcomes have been
    checked."""
    hazards, event_times, event_types, sequence_mask, entry_times, *_ = inputs
    survived, at_time = visits_at_risk(hazards, event_times, entry_times, sequence_mask)
    return (
        survived | at_time
        if censored_included
        else survived | (at_time & (event_types != 0)[:, None])
    )


def refuse_visit_weight(weight: Tensor, read: Tensor) -> None:
    """Refuse weights ``[B, V]`` below 0 where a visit is read."""
    if vmapped():
        return
    wrong = (weight < 0) & read
    if bool(wrong.any()):
        patient, visit = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"visit_weight must not be negative: patient {patient} has "
            f"{float(weight[patient, visit]):g} at visit {visit} "
            f"(visits at fault: {int(wrong.sum())})"
        )


def check_probabilities(inputs: Inputs, options: Options) -> None:
    """Refuse hazards outside [0, 1] at visits that are read, of padded hazards whose outcomes have
    been checked. A NaN is to reach the result."""
    if options.link != "probabilities" or vmapped():
        return
    hazards, event_times, event_types, sequence_mask, entry_times, _ = inputs
    survived, at_time = visits_at_risk(hazards, event_times, entry_times, sequence_mask)
    event = at_time & (event_types != 0)[:, None]
    if hazards.dim() == 3:
        causes = torch.arange(1, hazards.shape[2] + 1, device=hazards.device)
        survived, at_time = survived[..., None], at_time[..., None]
        event = at_time & (causes == event_types[:, None, None])
    if options.censored_visit == "included":
        survived = survived | at_time
    wrong = ((survived | event) & ((hazards < 0) | (hazards > 1))).flatten(1)
    at_fault = wrong.any(1)
    if (patient := _first(at_fault)) is not None:
        at = int(wrong[patient].to(torch.int8).argmax())
        _refuse(
            "hazards must be in [0, 1] with from_logits=False",
            patient,
            f"{float(hazards[patient].flatten()[at]):g} at visit {at // hazards[0, 0].numel()}",
            at_fault,
        )


def check_mask(sequence_mask: Tensor) -> None:
    """Refuse a mask ``[B, V]`` that is anything but ones first and zeros after them."""
    mask = sequence_mask.double()
    before = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1)[:, : mask.shape[1]]
    faults = ((mask != 0) & (mask != 1)) | (mask > before)
    if (patient := _first(wrong := faults.any(1))) is not None:
        visit = int(faults[patient].to(torch.int8).argmax())
        value = float(mask[patient, visit])
        _refuse(
            "sequence_mask must be 1 on a patient's visits and 0 on the padding after them",
            patient,
            f"{value:g} at visit {visit}" + (", after a 0" if value == 1 else ""),
            wrong,
        )


def vmapped() -> bool:
    """Whether a ``torch.func.vmap`` is active, which may hide values."""
    return torch._C._are_functorch_transforms_active() and any(
        interpreter.key() == torch._C._functorch.TransformType.Vmap
        for interpreter in torch._C._functorch.get_interpreter_stack() or ()
    )


def _first(wrong: Tensor) -> int | None:
    return int(wrong.to(torch.int8).argmax()) if bool(wrong.any()) else None


def _refuse(rule: str, patient: int, has: str, wrong: Tensor) -> None:
    count = int(wrong.sum())
    raise ValueError(f"{rule}: patient {patient} has {has} (patients at fault: {count})")
