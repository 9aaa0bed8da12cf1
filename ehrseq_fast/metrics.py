"""How well predicted risks order patients."""

from __future__ import annotations

from torch import Tensor


def concordance_index(
    hazards: Tensor,
    event_times: Tensor,
    event_indicators: Tensor,
    sequence_mask: Tensor | None = None,
) -> float:
    """Harrell's C-index of a patient's summed hazards, in [0, 1]; 0.5 is chance.

    ``C = P(risk_i > risk_j | patient i has the event before j's time)``, over the pairs that can be
    compared; a tie in risk counts half. A pair can be compared where the earlier of the two times
    is an event's; of two equal times, where one is an event's and the other censored (lifelines'
    rule; the reference package leaves those pairs out). Without any such pair the result is 0.5.

    The risk is the sum of hazards over real visits, as in the reference. It grows with the number
    of visits, so patients with longer records are scored as riskier whatever the model says: where
    lengths differ in a way that goes with the outcome, compare models at equal lengths.

    Computed on the host by lifelines in O(n log n), which needs the ``metrics`` extra.

    Args:
        hazards: ``[B, V]`` floating.
        event_times: ``[B]``, time (visit index) of event or censoring.
        event_indicators: ``[B]``, non-zero = event seen, 0 = censored.
        sequence_mask: ``[B, V]`` bool or numeric, non-zero for real visits. Without it padded slots
            count, which is right only where their hazards are 0, as the models here give them.

    Raises:
        ValueError: for shapes that do not fit, and NaN among real hazards or times.
        ImportError: where lifelines is not installed.

    Example:
        >>> import torch
        >>> from ehrseq_fast.metrics import concordance_index
        >>> hazards = torch.tensor([[0.9, 0.5], [0.1, 0.1], [0.2, 0.3]])
        >>> concordance_index(hazards, torch.tensor([0, 2, 1]), torch.tensor([1, 0, 1]))
        1.0
    """
    if hazards.dim() != 2:
        raise ValueError(f"hazards must be [B, V], got shape {list(hazards.shape)}")
    patients = hazards.shape[0]
    for name, tensor in (("event_times", event_times), ("event_indicators", event_indicators)):
        if tensor.shape != (patients,):
            raise ValueError(f"{name} must be [B] = [{patients}], got shape {list(tensor.shape)}")
    if sequence_mask is not None and sequence_mask.shape != hazards.shape:
        raise ValueError(
            f"sequence_mask must be [B, V] = {list(hazards.shape)} as hazards, "
            f"got shape {list(sequence_mask.shape)}"
        )
    hazards = hazards.detach().cpu().double()
    if sequence_mask is not None:
        hazards = hazards.masked_fill(sequence_mask.cpu() == 0, 0.0)
    risk = hazards.sum(1)
    times = event_times.detach().cpu().double()
    _refuse_nan("hazards", risk)
    _refuse_nan("event_times", times)
    score = _lifelines_concordance_index()
    events = event_indicators.detach().cpu() != 0
    try:
        # lifelines wants a score that rises with survival, so the risk is turned round.
        return float(score(times.numpy(), -risk.numpy(), events.numpy()))
    except ZeroDivisionError:
        return 0.5


def _refuse_nan(name: str, per_patient: Tensor) -> None:
    missing = per_patient.isnan()
    if bool(missing.any()):
        raise ValueError(
            f"{name} of {int(missing.sum())} patients hold NaN. The first is patient "
            f"{int(missing.int().argmax())}."
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
