"""Whether the event comes within a horizon of each visit, as labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..survival_nll.checks import require_outcomes, vmapped
from ..visitwise import Visits
from . import reference
from .checks import check_horizon, check_outcomes, check_values

if TYPE_CHECKING:
    from ..batch import PackedVisits


def fixed_horizon_labels(
    event_times: Tensor | None = None,
    event_indicators: Tensor | None = None,
    horizon: float = 1.0,
    sequence_mask: Tensor | None = None,
    *,
    visit_times: Tensor | None = None,
    batch: PackedVisits | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Labels of "the event comes within the horizon" at every visit, and which of them are known.

    With :math:`s` the time of a visit, :math:`T` that of the patient's event or censoring, and the
    horizon :math:`w`:

    ================================  =====================
    :math:`s < T \le s + w`, event     1
    :math:`T > s + w`, event           0
    :math:`T \ge s + w`, censored      0: no event up to then
    :math:`T < s + w`, censored        not known
    :math:`s \ge T`                    not asked: the event has come, or nothing is seen any more
    ================================  =====================

    So the visit of the event itself is left out. This is the definition of what
    :func:`fixed_horizon_bce` computes within its kernel.

    Args:
        event_times: ``[B]``: the visit of event or censoring, counted from 0, an integer; or, with
            ``visit_times``, its time on the same axis (days), of any real dtype. Of a batch its
            own where it is left out.
        event_indicators: ``[B]`` bool or number: 1 event seen, 0 censored.
        horizon: above 0, in visits or in the unit of ``visit_times``.
        sequence_mask: ``[B, V]``: 1 on a patient's visits, 0 on the padding after them. It or
            ``visit_times`` says how many visits there are.
        visit_times: ``[B, V]``, or ``[n_visits]`` of a batch: the time of each visit, of any real
            dtype; compared in float64.
        batch: a packed batch, of whose rows the labels are.

    Returns:
        Labels, int64, 0 where nothing is known, and bool, whether they are: ``[B, V]``, or
        ``[n_visits]`` of a batch. As :class:`~ehrseq_fast.losses.FixedHorizonProgressionLoss` takes
        them.

    Raises:
        ValueError: for shapes that do not fit, masks with holes, NaN, negative visits, indicators
            other than 0 and 1, a horizon that is not above 0.
        TypeError: for dtypes, and event times in floating point without ``visit_times``.

    Example:
        >>> import torch
        >>> from ehrseq_fast import fixed_horizon_labels
        >>> times, seen = torch.tensor([3, 3]), torch.tensor([1, 0])
        >>> labels, known = fixed_horizon_labels(times, seen, 2, torch.ones(2, 4))
        >>> labels
        tensor([[0, 1, 1, 0],
                [0, 0, 0, 0]])
        >>> known
        tensor([[ True,  True,  True, False],
                [ True,  True, False, False]])
    """
    visits = Visits(sequence_mask)
    if batch is not None:
        if sequence_mask is not None:
            raise ValueError("sequence_mask: expected None with a batch, got a mask")
        visits = Visits(None, batch.row_starts, batch.unsorted_indices, batch.last_rows)
        if visit_times is None:
            event_times = batch.event_times if event_times is None else event_times
        if event_indicators is None:
            event_indicators = batch.event_indicators
    event_times, event_indicators = require_outcomes(
        event_times=event_times, event_indicators=event_indicators
    )
    like = visit_times if visit_times is not None else sequence_mask
    patients = len(event_times)
    if batch is not None:
        like = torch.empty(batch.n_visits, device=batch.device)
        patients = len(batch)
    if like is None:
        raise TypeError("sequence_mask: expected it, visit_times or a batch, got none of them")
    if like.dim() != (1 if visits.packed else 2):
        expected = "[n_visits]" if visits.packed else "[B, V]"
        raise ValueError(f"visit_times: expected shape {expected}, got {list(like.shape)}")
    check_horizon(horizon)
    outcomes = (event_times, event_indicators, visit_times)
    check_outcomes(like, "visits", visits, patients, *outcomes)
    if like.device.type == "cpu" and not torch.compiler.is_compiling() and not vmapped():
        check_values(visits, *outcomes)
    within, known = reference.labels(
        like, event_times, event_indicators, visits, visit_times, horizon
    )
    return within.long(), known
