"""Input validation of the operators in Triton, called directly: all that they index by, in
the words of the compiled ones (``csrc/survival_nll``)."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ...checks import FLOATING, INTEGER, REAL, accumulator


def refuse(operation: str, name: str, expected: str, got: object) -> NoReturn:
    """``ValueError`` in one form."""
    raise ValueError(f"{operation}: {name}: expected {expected}, got {got}")


def check_hazards(
    operation: str, hazards: Tensor, dims: tuple[int, ...], shape: str, name: str = "hazards"
) -> None:
    """Dimensions and dtype."""
    if hazards.dim() not in dims:
        refuse(operation, name, f"shape {shape}", list(hazards.shape))
    if hazards.dtype not in FLOATING:
        expected = "float32, float64, bfloat16 or float16"
        refuse(operation, name, expected, hazards.dtype)


def check_options(
    operation: str, competing: bool, classes: int, link: int, eps: float, reduction: int
) -> None:
    """The numbers that encode options."""
    if not 0 <= link <= 3 or (link == 2 and not competing):
        refuse(operation, "link", "0..3" if competing else "0, 1 or 3", link)
    check_reduction(operation, reduction)
    if not 0 <= eps < 0.5:
        refuse(operation, "eps", "[0, 0.5)", eps)
    if classes - (link == 2) < 1:
        refuse(operation, "hazards", "at least one cause", f"{classes} values per visit")


def check_reduction(operation: str, reduction: int) -> None:
    """The number that encodes it."""
    if not 0 <= reduction <= 2:
        refuse(operation, "reduction", "0..2", reduction)


def check_rate_link(operation: str, link: int) -> None:
    """The number that encodes the link of a rate."""
    if not 0 <= link <= 1:
        refuse(operation, "link", "0..1", link)


def check_sigma(operation: str, sigma: float) -> None:
    """That exponents are divided by it."""
    if not 0 < sigma < float("inf"):
        refuse(operation, "sigma", "a finite number above 0", f"{sigma:f}")


def check_row_length(operation: str, slots: int, classes: int) -> None:
    """Positions within a patient's row are 32 bits wide."""
    if slots * classes >= 2**31:
        expected = "at most 2^31 - 1 values per patient"
        refuse(operation, "hazards", expected, f"{slots} visits of {classes}")


def check_patients(
    operation: str,
    hazards: Tensor,
    patients: int,
    competing: bool,
    event_times: Tensor,
    event_types: Tensor,
    entry_times: Tensor | None,
    sample_weight: Tensor | None,
) -> None:
    """One number per patient each, on the hazards' device."""
    types = ("event_types", INTEGER | {torch.bool}) if competing else ("event_indicators", REAL)
    for tensor, (name, dtypes) in (
        (event_times, ("event_times", INTEGER)),
        (event_types, types),
        (entry_times, ("entry_times", INTEGER)),
        (sample_weight, ("sample_weight", REAL)),
    ):
        if tensor is None:
            continue
        if tensor.shape != (patients,):
            refuse(operation, name, f"shape [B] = [{patients}]", list(tensor.shape))
        if tensor.dtype not in dtypes:
            kind = {INTEGER: "an integer", REAL: "a bool, integer or float"}.get(
                dtypes, "an integer or bool"
            )
            refuse(operation, name, f"{kind} dtype", tensor.dtype)
        _check_device(operation, hazards, tensor)


def check_mask(operation: str, hazards: Tensor, sequence_mask: Tensor | None) -> None:
    """One value per slot."""
    if sequence_mask is None:
        return
    if sequence_mask.shape != hazards.shape[:2]:
        expected = f"shape [B, V] = {list(hazards.shape[:2])}"
        refuse(operation, "sequence_mask", expected, list(sequence_mask.shape))
    if sequence_mask.dtype not in REAL:
        refuse(operation, "sequence_mask", "a bool, integer or float dtype", sequence_mask.dtype)
    _check_device(operation, hazards, sequence_mask)


def check_rows(operation: str, hazards: Tensor, *rows: Tensor) -> None:
    """row_starts, unsorted_indices and last_rows; the kernel itself leaves out rows outside."""
    names = ("row_starts", "unsorted_indices", "last_rows")
    for name, tensor, shape in zip(names, rows, ("[V + 1]", "[B]", "[B]"), strict=True):
        if tensor.dim() != 1:
            refuse(operation, name, f"shape {shape}", list(tensor.shape))
        if tensor.dtype != torch.int64:
            refuse(operation, name, "int64", tensor.dtype)
        _check_device(operation, hazards, tensor)
    starts, ranks, last = rows
    if len(starts) < 1:
        refuse(operation, "row_starts", "shape [V + 1] with 0 <= V", list(starts.shape))
    if len(ranks) != len(last):
        refuse(operation, "last_rows", f"shape [B] = {list(ranks.shape)}", list(last.shape))


def check_logits(
    operation: str,
    logits: Tensor,
    competing: bool,
    sequence_mask: Tensor | None,
    rows: tuple[Tensor | None, ...],
    outcomes: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
) -> tuple[int, int, int]:
    """Logits over time, ``[B, V]`` with a mask or rows of a packed batch, ``[n_visits]``, with a
    last dimension of causes where there are competing ones; ``rows`` and ``outcomes`` are what
    comes with them. Returns how many patients, slots and classes there are."""
    patients, slots, classes = check_layout(operation, logits, competing, sequence_mask, rows)
    if classes < 1:
        refuse(operation, "logits", "at least one cause", "0 values per visit")
    check_row_length(operation, slots, classes)
    check_patients(operation, logits, patients, competing, *outcomes)
    return patients, slots, classes


def check_layout(
    operation: str,
    logits: Tensor,
    has_classes: bool,
    sequence_mask: Tensor | None,
    rows: tuple[Tensor | None, ...],
    name: str = "logits",
) -> tuple[int, int, int]:
    """Logits of visits, ``[B, V]`` with a mask or rows of a packed batch, ``[n_visits]``, with a
    last dimension ``K`` where ``has_classes``; errors call them ``name``. Returns how many
    patients, slots and classes there are."""
    given = _all_or_none(operation, rows)
    shape = ("[n_visits]", "[n_visits, K]") if given else ("[B, V]", "[B, V, K]")
    check_hazards(operation, logits, (2 - bool(given) + has_classes,), shape[has_classes], name)
    classes = logits.shape[-1] if has_classes else 1
    if given:
        if sequence_mask is not None:
            refuse(operation, "sequence_mask", "none with a packed batch", "one")
        check_rows(operation, logits, *given)
        return len(given[1]), len(given[0]) - 1, classes
    check_mask(operation, logits, sequence_mask)
    return logits.shape[0], logits.shape[1], classes


def check_numbers(
    operation: str,
    logits: Tensor,
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    dims: str,
    dtypes: frozenset[torch.dtype] = REAL,
) -> None:
    """Numbers beside the logits, of a shape whose dimensions ``dims`` names."""
    if tensor is None:
        return
    if tensor.shape != shape:
        refuse(operation, name, f"shape {dims} = {list(shape)}", list(tensor.shape))
    if tensor.dtype not in dtypes:
        kinds = {INTEGER: "an integer dtype", FLOATING: "a floating-point dtype"}
        kind = kinds.get(dtypes, "a bool, integer or float dtype")
        refuse(operation, name, kind if len(dtypes) > 1 else str(*dtypes), tensor.dtype)
    _check_device(operation, logits, tensor)


def column(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """One number per patient as a kernel takes it: the tensor and its stride."""
    return tensor, 0 if tensor is None else tensor.stride(0)


def columns_of_patients(
    event_times: Tensor,
    event_types: Tensor,
    sequence_mask: Tensor | None,
    entry_times: Tensor | None,
    sample_weight: Tensor | None,
) -> tuple[Any, ...]:
    """What the kernels of the losses over time take of outcomes and the mask, in their order."""
    mask = (sequence_mask, *(sequence_mask.stride() if sequence_mask is not None else (0, 0)))
    of_outcomes = (*column(event_times), *column(event_types))
    return (*of_outcomes, *mask, *column(entry_times), *column(sample_weight))


def check_scale(
    grad: Tensor, grad_nll: Tensor, rows: tuple[Tensor | None, ...], dtype: torch.dtype
) -> None:
    """A saved gradient, and one number or one per patient to multiply it by."""
    name = "survival_nll_scale"
    saved = torch.float32 if dtype == torch.float16 else dtype
    if dtype not in FLOATING:
        refuse(name, "dtype", "float32, float64, bfloat16 or float16", dtype)
    if grad.dtype != saved:
        refuse(name, "grad", f"{saved}, as saved of hazards in {dtype}", grad.dtype)
    if not 1 <= grad.dim() <= 3:
        refuse(name, "grad", "the shape of hazards", list(grad.shape))
    if grad_nll.dtype != accumulator(grad.dtype):
        refuse(name, "grad_nll", str(accumulator(grad.dtype)), grad_nll.dtype)
    _check_device(name, grad, grad_nll)
    given = _all_or_none(name, rows)
    if given:
        check_rows(name, grad, *given)
    patients = len(given[1]) if given else grad.shape[0]
    if grad_nll.dim() and grad_nll.shape != (patients,):
        refuse(name, "grad_nll", f"shape [] or [B] = [{patients}]", list(grad_nll.shape))


def _all_or_none(operation: str, rows: tuple[Tensor | None, ...]) -> list[Tensor]:
    given = [tensor for tensor in rows if tensor is not None]
    if len(given) not in (0, 3):
        refuse(operation, "row_starts, unsorted_indices, last_rows", "all or none of them", "some")
    return given


def _check_device(operation: str, like: Tensor, tensor: Tensor) -> None:
    if tensor.device != like.device:
        refuse(
            operation,
            "tensors",
            "all tensors of a call on one device",
            f"{like.device} and {tensor.device}",
        )
