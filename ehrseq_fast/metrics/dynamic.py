"""The incident/dynamic concordance of risks that change from visit to visit."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import ArrayLike
from .values import (
    Bools,
    Ints,
    VisitValues,
    included,
    read_entry_times,
    read_events,
    read_scores,
    read_visit_times,
)

NO_PAIR = "expected a patient with the event and another still at risk after that visit, got none"


def concordance_td(
    risk: Any,
    event_times: ArrayLike | None = None,
    event_indicators: ArrayLike | None = None,
    *,
    event_types: ArrayLike | None = None,
    cause: int | None = None,
    lengths: ArrayLike | None = None,
    entry_times: ArrayLike | None = None,
    censored_visit: str = "excluded",
) -> float:
    """C_td: at the visit of an event, how often the patient who has it had the higher risk than one
    who is still at risk after it. In [0, 1]; **0.5 is chance**.

    ``C_td = P(r_i(T_i) > r_j(T_i) | i has the event at T_i, j is at risk after T_i)`` over all such
    pairs, ties half. Risks are compared at the same visit only, so a score that depends on the
    visit index alone gets exactly 0.5, whatever the lengths of the records. Without any pair 0.5.

    At risk after t are all with a time above t; of those censored at t it depends on what the visit
    of a censoring says, as in the losses: with ``censored_visit="included"`` that it was survived,
    so they are, with ``"excluded"`` nothing, so they are not. Two events at one visit are never
    compared. Source: Antolini, Boracchi and Biganzoli, Statistics in Medicine 24 (2005), with
    time-dependent covariates; incident/dynamic in the sense of Heagerty and Zheng, Biometrics 61
    (2005).

    Of competing events that of ``cause``: cases have an event of this cause at T, controls are
    those without any event after T. Who had an event of another cause has left the risk set, at
    that very visit, and is not compared, whatever ``censored_visit`` says. With the cause-specific
    hazard as the risk this is how well it ranks those who are at risk; chance is 0.5 as well.
    Source: Saha and Heagerty, Biometrics 66 (2010), incident cases of a cause and dynamic controls.
    (Wolbers et al., Biostatistics 15 (2014), keep those with a competing event as controls for
    ever, which asks how well the cumulative incidence at one horizon ranks: that is
    :func:`~ehrseq_fast.metrics.landmark_auc` of a cause.)

    Computed by this package with NumPy: the risk set of each event visit is sorted once, O(n log n)
    per visit. pycox's ``concordance_td`` compares all pairs in O(n²) (55 s at 100,000 patients),
    lifelines and scikit-survival have no risk that depends on time.

    Args:
        risk: the risk at each visit from what was known by then, ``[B, V]`` padded, or flat
            ``[n_visits]`` patient by patient with ``lengths``, or :class:`~ehrseq_fast.PackedRows`
            (or a list of them, one per batch), whose outcomes are the default; with rows the batch
            may stand in the place of ``event_times``. Only visits up to a patient's event time are
            read. With a ``cause`` also ``[B, V, K]`` or PackedRows
            ``[n_visits, K]``, of which its column is taken.
        event_times: ``[B]``, the visit of event or censoring, counted from 0.
        event_indicators: ``[B]``, 1 event seen, 0 censored; None with a ``cause``.
        event_types: ``[B]``, 0 censored, 1 to K the cause of the event; with a ``cause``.
        cause: the event of interest, 1 to K.
        lengths: ``[B]``, visits of each patient.
        entry_times: ``[B]``, the first visit at risk: before it a patient is in no risk set.
        censored_visit: ``"excluded"`` or ``"included"``.

    Raises:
        ValueError: for shapes that do not fit, event times outside a patient's visits, entry times
            after them, indicators other than 0 and 1, types that are no cause, a cause above K, NaN
            among the risks that are read; with the first patient at fault.
        TypeError: where outcomes are missing, types without a cause, and for values that are not
            real numbers.

    Example:
        >>> import numpy as np
        >>> from ehrseq_fast.metrics import concordance_td
        >>> risk = np.array([[0.1, 0.9, 0.0], [0.2, 0.3, 0.1], [0.3, 0.3, 0.8]])
        >>> concordance_td(risk, [1, 2, 2], [1, 0, 1])  # 0.9 is above 0.3, twice
        1.0
        >>> concordance_td(np.arange(3) * np.ones((3, 1)), [1, 2, 2], [1, 0, 1])
        0.5
        >>> concordance_td(risk, [1, 2, 2], event_types=[2, 0, 1], cause=2)
        1.0
    """
    values, n_causes = read_scores("risk", risk, lengths, cause)
    times, seen, competing = read_events(
        values, event_times, event_indicators, event_types, cause, n_causes
    )
    visits = read_visit_times(values, times)
    entry = read_entry_times(values, entry_times, visits)
    found = concordance(values, visits, seen, entry, included(censored_visit), competing)
    return 0.5 if isinstance(found, str) else found


def concordance(
    values: VisitValues,
    visits: Ints,
    seen: Bools,
    entry: Ints | None,
    with_censored: bool,
    competing: Bools | None = None,
) -> float | str:
    """Of arguments that were checked; why there is none, without any pair."""
    censored = ~seen if competing is None else ~(seen | competing)
    order = np.argsort(visits, kind="stable")
    by_time = visits[order]
    pairs = doubled = 0  # twice the score, so that ties are whole numbers
    for visit in np.unique(visits[seen]).tolist():
        low, high = np.searchsorted(by_time, [visit, visit + 1])
        now, later = order[low:high], order[high:]
        cases = now[seen[now]]
        if with_censored:
            later = np.concatenate([later, now[censored[now]]])
        if entry is not None:
            later = later[entry[later] <= visit]
        if not len(later):
            continue
        controls = np.sort(values.at(later, visit))
        risks = values.at(cases, visit)
        doubled += int(np.searchsorted(controls, risks, "left").sum())
        doubled += int(np.searchsorted(controls, risks, "right").sum())
        pairs += len(cases) * len(later)
    return doubled / (2 * pairs) if pairs else NO_PAIR
