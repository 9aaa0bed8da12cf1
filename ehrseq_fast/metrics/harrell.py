"""Harrell's C-index of summed hazards, as the reference package has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import ArrayLike, as_array, got
from ..batch import PackedVisits
from ..checks import expect_option
from ..rows import PackedRows
from ..rows.beside import with_batch

TIES = ("lifelines", "reference")


def concordance_index(
    hazards: Tensor | PackedRows,
    event_times: Tensor | PackedVisits | None = None,
    event_indicators: Tensor | None = None,
    sequence_mask: Tensor | None = None,
    *,
    censored_visit: str = "excluded",
    ties: str = "lifelines",
) -> float:
    """Harrell's C-index of a patient's summed hazards, in [0, 1]; for parity with the reference.

    **Its chance level is 0.5 only at equal record lengths.** Records end at their event, so sums of
    hazards rank patients by length: on the OMOP records of the main job a constant hazard scores
    0.009. :func:`~ehrseq_fast.metrics.concordance_td`, whose chance level is 0.5, is the headline.

    ``C = P(risk_i > risk_j | patient i has the event before j's time)``, over the pairs that can be
    compared; a tie in risk counts half, as in lifelines (``ties="lifelines"``), or as an error, as
    in the reference (``ties="reference"``: a constant risk then scores 0). A pair can be compared
    where the earlier of the two times is an event's. Of two equal times, one an event's and the
    other censored, it depends on what the visit of a censoring says, as in the losses: with
    ``censored_visit="excluded"`` nothing, so the censored patient may have had the event at that
    very visit and the pair is left out; with ``"included"`` that it was survived, so the pair
    counts (lifelines' rule). Two events at the same time are never compared. Without any pair the
    result is 0.5.

    The risk is the sum of hazards over real visits, as in the reference. It grows with the number
    of visits, so patients with longer records are scored as riskier whatever the model says: where
    lengths differ in a way that goes with the outcome, compare models at equal lengths.

    Computed on the host by lifelines in O(n log n), which needs the ``metrics`` extra.

    Args:
        hazards: ``[B, V]`` floating, a tensor or an array; or :class:`~ehrseq_fast.PackedRows`,
            without a mask, whose batch's outcomes are taken where none are given (or those of a
            batch that is given in the place of ``event_times``). Or ``[B]``: each patient's risk,
            such as a Cox model's or a sum of your own, which is taken as it is, without a mask.
        event_times: ``[B]``, time (visit index) of event or censoring.
        event_indicators: ``[B]``, non-zero = event seen, 0 = censored.
        sequence_mask: ``[B, V]`` bool or numeric, non-zero for real visits. Without it padded slots
            count, which is right only where their hazards are 0, as the models here give them.
        censored_visit: ``"excluded"`` or ``"included"``.
        ties: ``"lifelines"`` or ``"reference"``. lifelines' own figure is that of the former with
            ``censored_visit="included"``.

    Raises:
        ValueError: for shapes that do not fit, an unknown ``censored_visit`` or ``ties``, and NaN
            among real hazards, times, indicators or the mask.
        TypeError: where outcomes are missing, and for values that are not real numbers.
        ImportError: where lifelines is not installed.

    Example:
        >>> import torch
        >>> from ehrseq_fast.metrics import concordance_index
        >>> hazards = torch.tensor([[0.9, 0.5], [0.1, 0.1], [0.2, 0.3]])
        >>> concordance_index(hazards, torch.tensor([0, 2, 1]), torch.tensor([1, 0, 1]))
        1.0
        >>> concordance_index(hazards.sum(1), torch.tensor([0, 2, 1]), torch.tensor([1, 0, 1]))
        1.0
    """
    expect_option("censored_visit", censored_visit, ("excluded", "included"))
    expect_option("ties", ties, TIES)
    given: Any
    hazards, given = with_batch(hazards, event_times, "hazards")
    if isinstance(hazards, PackedRows):
        if sequence_mask is not None:
            raise ValueError("sequence_mask: expected None, as hazards are PackedRows, got a mask")
        batch = hazards.batch
        given = batch.event_times if given is None else given
        event_indicators = batch.event_indicators if event_indicators is None else event_indicators
        hazards = hazards.to_padded()
    if given is None or event_indicators is None:
        raise TypeError("event_times and event_indicators: expected tensors, got None")
    hazards = _on_host("hazards", hazards)
    times = _on_host("event_times", given)
    event_indicators = _on_host("event_indicators", event_indicators)
    sequence_mask = None if sequence_mask is None else _on_host("sequence_mask", sequence_mask)
    _check_shapes(hazards, times, event_indicators, sequence_mask)

    hazards = hazards.double()
    if sequence_mask is not None:
        _refuse_nan("sequence_mask", sequence_mask.double().isnan().any(1))
        hazards = hazards.masked_fill(sequence_mask == 0, 0.0)
    risk = hazards if hazards.dim() == 1 else hazards.sum(1)
    _refuse_nan("hazards", risk.isnan())
    _refuse_nan("event_times", times.double().isnan())
    _refuse_nan("event_indicators", event_indicators.double().isnan())
    events = event_indicators != 0
    times = _ranks(times)
    if ties == "reference":
        # Of equal risks that of the later time is made the larger one: a pair that can be compared
        # is then an error.
        order = np.lexsort(((2 * times + (~events).long()).numpy(), risk.numpy()))
        risk = torch.empty_like(risk)
        risk[torch.from_numpy(order)] = torch.arange(len(risk), dtype=risk.dtype, device="cpu")
    if censored_visit == "excluded":
        # a censoring comes before the events of its time, and behind those of the time before
        times = 2 * times - (~events).long()
    score = _lifelines_concordance_index()
    try:
        # lifelines wants a score that rises with survival, so the sign of the risk changes.
        return float(score(times.numpy(), -risk.numpy(), events.numpy()))
    except ZeroDivisionError:
        return 0.5


def _on_host(name: str, values: ArrayLike) -> Tensor:
    if isinstance(values, Tensor):
        tensor = values.detach().cpu()
    else:
        array = as_array(name, values)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{name}: expected real numbers, got {got(array)}")
        tensor = torch.tensor(array, device="cpu")
    if tensor.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {tensor.dtype}")
    return tensor


def _ranks(times: Tensor) -> Tensor:
    """int64 ``[B]``: the place of each time among the distinct ones. Of integers it is exact, which
    their float64 is not beyond 2**53."""
    array = (times.double() if times.is_floating_point() else times).numpy()
    return torch.from_numpy(np.unique(array, return_inverse=True)[1])


def _check_shapes(
    hazards: Tensor, event_times: Tensor, event_indicators: Tensor, sequence_mask: Tensor | None
) -> None:
    if hazards.dim() not in (1, 2):
        raise ValueError(
            f"hazards: expected [B, V], or [B] risks of patients, got shape {list(hazards.shape)}"
        )
    patients = hazards.shape[0]
    for name, tensor in (("event_times", event_times), ("event_indicators", event_indicators)):
        if tensor.shape != (patients,):
            raise ValueError(f"{name}: expected [B] = [{patients}], got shape {list(tensor.shape)}")
    if sequence_mask is not None and sequence_mask.shape != hazards.shape:
        raise ValueError(
            f"sequence_mask: expected [B, V] = {list(hazards.shape)} as hazards, "
            f"got shape {list(sequence_mask.shape)}"
        )


def _refuse_nan(name: str, missing: Tensor) -> None:
    if bool(missing.any()):
        raise ValueError(
            f"{name}: expected numbers, got NaN (patient {int(missing.int().argmax())}; "
            f"{int(missing.sum())} in all)"
        )


def _lifelines_concordance_index():  # type: ignore[no-untyped-def]
    try:
        from lifelines.utils import concordance_index as lifelines_concordance_index
    except ImportError as error:
        raise ImportError(
            "concordance_index is computed by lifelines, which is not installed: "
            "pip install ehrseq_fast[metrics]"
        ) from error
    return lifelines_concordance_index


__all__ = ["concordance_index"]
