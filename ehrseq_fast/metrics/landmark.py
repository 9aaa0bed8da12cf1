"""Prediction from a landmark s for a horizon w: AUC and Brier score, corrected for censoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import ArrayLike, as_array
from ..rows import PackedRows
from .censoring import Censoring
from .values import (
    Bools,
    Floats,
    Ints,
    VisitValues,
    included,
    read_events,
    read_values,
    read_visit_times,
    refuse,
    refuse_unordered,
)


@dataclass(frozen=True)
class AtLandmark:
    """Patients at risk at a landmark, and what is known of them by the horizon.

    Attributes:
        patients: int64 ``[n]``, those with a time above s and a visit at s or before.
        visits: int64 ``[n]``, the last visit at s or before.
        case: event in (s, s + w].
        control: known to be without the event at s + w, by another cause's event too.
        weight: 1 / the probability of not being censored before that was known; 0 where it was not.
    """

    patients: Ints
    visits: Ints
    case: Bools
    control: Bools
    weight: Floats

    def risks(self, values: VisitValues) -> Floats:
        """The predictions at the landmark, which must be probabilities."""
        found = values.at(self.patients, self.visits).astype(np.float64)
        wrong = ~((found >= 0) & (found <= 1))
        if wrong.any():
            first = int(wrong.argmax())
            raise ValueError(
                f"{values.name}: expected probabilities in [0, 1], got {found[first]:g} (patient "
                f"{self.patients[first]}, visit {self.visits[first]}; {int(wrong.sum())} in all)"
            )
        return found


def landmark_auc(
    risk: Any,
    event_times: ArrayLike | None = None,
    event_indicators: ArrayLike | None = None,
    *,
    landmark: float | ArrayLike,
    horizon: float,
    visit_times: Any = None,
    lengths: ArrayLike | None = None,
    censored_visit: str = "excluded",
    event_types: ArrayLike | None = None,
    cause: int | None = None,
) -> float:
    """Cumulative/dynamic AUC from landmark s within horizon w. In [0, 1]; 0.5 is chance.

    At risk are patients with ``T > s`` and a visit at s or before; the score is the risk at their
    last such visit. Cases have the event in ``s < T ≤ s + w``, controls ``T > s + w``. Who was
    censored before is neither; weights ``1 / Ĝ(T−|s)`` of cases and ``1 / Ĝ(s + w|s)`` of controls
    make up for them (:mod:`~ehrseq_fast.metrics.censoring`: ties), right where censoring does not
    depend on the risk. Ties in the score count half.

    Of competing events that of ``cause``: cases have an event of this cause in the window, controls
    are those without any event by its end **and** those who had one of another cause in it, who are
    known never to be cases; both are weighted at the time of their event, with Ĝ of all events. The
    score is to rise with the cumulative incidence of the cause within w. Source: Blanche et al.,
    Biometrics 71 (2015), whose second definition of controls this is.

    Time is counted in visits, or in days with ``visit_times``. Of patients with a landmark of their
    own (their first visit, a random one) give s as an array: T is then counted from it.

    Computed by scikit-learn's ``roc_auc_score`` with these weights, which is the estimator of Uno
    et al., JASA 102 (2007), as in scikit-survival's ``cumulative_dynamic_auc``.

    Args:
        risk: any score that rises with the risk; layouts as in
            :func:`~ehrseq_fast.metrics.concordance_td`. ``[B]`` without ``lengths``: the score at
            the landmark; times are then taken from the first of one visit, ``landmark=0``.
        event_times: ``[B]``, in visits (integers from 0) or, with ``visit_times`` or a ``[B]``
            risk, in days.
        event_indicators: ``[B]``, 1 event seen, 0 censored.
        landmark: s, a number or ``[B]``.
        horizon: w, above 0.
        visit_times: when each visit was, in the layout of ``risk`` and on the scale of
            ``event_times``; not falling from one visit to the next. Beside PackedRows a flat tensor
            is refused, as it may be in the order of rows or patient by patient.
        lengths: ``[B]``, visits of each patient.
        censored_visit: what the time of a censoring says, as in the losses.
        event_types: ``[B]``, 0 censored, 1 to K the cause of the event; with a ``cause``.
        cause: the event of interest, 1 to K.

    Raises:
        ValueError: as :func:`~ehrseq_fast.metrics.concordance_td`, and where nobody is at risk,
            there are no cases or no controls, or nobody is observed until the horizon (Ĝ = 0).
        ImportError: where scikit-learn is not installed.

    Example:
        >>> import numpy as np
        >>> from ehrseq_fast.metrics import landmark_auc
        >>> risk = np.array([0.9, 0.4, 0.2, 0.1])  # at the landmark
        >>> landmark_auc(risk, [100, 200, 400, 800], [1, 1, 0, 1], landmark=0, horizon=365)
        1.0
    """
    values = read_values("risk", risk, lengths)
    events = read_events(values, event_times, event_indicators, event_types, cause)
    found = select(values, events, landmark, horizon, visit_times, censored_visit)
    return weighted_auc(found, values.at(found.patients, found.visits))


def brier(
    risk: Any,
    event_times: ArrayLike | None = None,
    event_indicators: ArrayLike | None = None,
    *,
    landmark: float | ArrayLike,
    horizon: float,
    visit_times: Any = None,
    lengths: ArrayLike | None = None,
    censored_visit: str = "excluded",
    event_types: ArrayLike | None = None,
    cause: int | None = None,
) -> float:
    """The Brier score: the mean squared error of the risk within w from landmark s. 0 is best; the
    chance level is that of the baselines.

    ``1/n · Σ_i [ case_i · (1 − p_i)² / Ĝ(T_i−|s) + control_i · p_i² / Ĝ(s + w|s) ]`` over the n
    patients at risk at s. Source: Graf et al., Statistics in Medicine 18 (1999); Schoop et al.,
    Biometrics 64 (2008), for landmarks. Computed by this package with NumPy: scikit-survival's
    ``brier_score`` takes weights that are wrong on visit time
    (:mod:`~ehrseq_fast.metrics.censoring`), lifelines has none for censored data. Of a ``cause``
    cases and controls are those of :func:`~ehrseq_fast.metrics.landmark_auc` (Schoop et al.,
    Biometrical Journal 53 (2011)), and the risk is the cumulative incidence of the cause within w.

    Arguments and errors are those of :func:`~ehrseq_fast.metrics.landmark_auc`, but that ``risk``
    must be the probability of the event within w, in [0, 1], and that cases or controls may be
    missing.

    Example:
        >>> import numpy as np
        >>> from ehrseq_fast.metrics import brier
        >>> risk = np.array([0.9, 0.4, 0.2, 0.1])
        >>> round(brier(risk, [100, 200, 400, 800], [1, 1, 0, 1], landmark=0, horizon=365), 6)
        0.105
    """
    values = read_values("risk", risk, lengths)
    events = read_events(values, event_times, event_indicators, event_types, cause)
    found = select(values, events, landmark, horizon, visit_times, censored_visit)
    return squared_error(found, found.risks(values))


def integrated_brier(
    risks: Any,
    event_times: ArrayLike | None = None,
    event_indicators: ArrayLike | None = None,
    *,
    landmark: float | ArrayLike,
    horizons: Sequence[float],
    visit_times: Any = None,
    lengths: ArrayLike | None = None,
    censored_visit: str = "excluded",
    event_types: ArrayLike | None = None,
    cause: int | None = None,
) -> float:
    """The mean of :func:`brier` over horizons from 0 to the last, by the trapezoidal rule; at 0 it
    is 0.

    Args:
        risks: a risk for each horizon: the layouts of ``risk`` with a last dimension J.
        horizons: J of them, ascending.

    All else as in :func:`brier`.

    Example:
        >>> import numpy as np
        >>> from ehrseq_fast.metrics import integrated_brier
        >>> risks = np.array([[0.1, 0.3], [0.2, 0.9]])
        >>> round(integrated_brier(risks, [40, 20], [0, 1], landmark=0, horizons=[10, 30]), 4)
        0.0292
    """
    values = read_values("risks", risks, lengths, trailing=1)
    ends = as_array("horizons", horizons).astype(np.float64)
    if values.values.shape[1:] != ends.shape:
        raise ValueError(
            f"horizons: expected one for each of {values.values.shape[-1]} risks, got "
            f"{list(ends.shape)}"
        )
    if not (np.diff(ends, prepend=0.0) > 0).all():
        raise ValueError(f"horizons: expected ascending numbers above 0, got {ends.tolist()}")
    events = read_events(values, event_times, event_indicators, event_types, cause)
    scores = [0.0]
    for j, horizon in enumerate(ends.tolist()):
        column = values.column(j)
        found = select(column, events, landmark, horizon, visit_times, censored_visit)
        scores.append(squared_error(found, found.risks(column)))
    heights = (np.array(scores[1:]) + scores[:-1]) / 2
    return float((heights * np.diff(ends, prepend=0.0)).sum() / ends[-1])


def select(
    values: VisitValues,
    events: tuple[NDArray[Any], Bools, Bools | None],
    landmark: float | ArrayLike,
    horizon: float,
    visit_times: Any,
    censored_visit: str,
) -> AtLandmark:
    """Who is at risk at the landmark, with weights; ``events`` of :func:`read_events`."""
    with_censored = included(censored_visit)
    times, seen, competing = events
    if not 0 < horizon < np.inf:
        raise ValueError(f"horizon: expected a number above 0, got {horizon}")
    start = as_array("landmark", landmark)
    if start.dtype.kind not in "biuf" or start.shape not in ((), (len(values),)):
        raise ValueError(
            f"landmark: expected a number or [B] = [{len(values)}], got {start.dtype} "
            f"{list(start.shape)}"
        )
    start = np.broadcast_to(start, times.shape)
    refuse("landmark", start, ~(start >= 0) | np.isinf(start), "numbers from 0")
    scores_alone = visit_times is None and bool((values.lengths == 1).all())
    if visit_times is None and not scores_alone:
        read_visit_times(values, times)
        visits = np.minimum(start.astype(np.int64), values.lengths - 1)
    elif scores_alone:
        visits = np.zeros(len(values), np.int64)
    else:
        when = read_when(values, visit_times)
        refuse_unordered(when, falls=False)
        visits = last_visits(when, start)
    since = times.astype(np.float64) - start
    found = at_landmark(visits, since, seen, float(horizon), with_censored, competing)
    if not len(found.patients):
        raise ValueError(
            f"landmark: expected patients at risk after {landmark}, got none of {len(values)}"
        )
    return found


def at_landmark(
    visits: Ints,
    since: Floats,
    seen: Bools,
    horizon: float,
    with_censored: bool,
    competing: Bools | None = None,
) -> AtLandmark:
    """Of each patient's last visit at the landmark (−1 where there is none), and its time and
    indicators, counted from there."""
    any_event = seen if competing is None else seen | competing
    at_risk = (since > 0) | (with_censored & ~any_event & (since >= 0))
    patients = np.flatnonzero(at_risk & (visits >= 0))
    if not len(patients):
        nobody = np.zeros(0, np.bool_)
        return AtLandmark(patients, patients, nobody, nobody, np.zeros(0))
    known = _known(
        patients, since[patients], seen[patients], any_event[patients], horizon, with_censored
    )
    return AtLandmark(patients, visits[patients], *known)


def read_when(values: VisitValues, visit_times: Any) -> VisitValues:
    """When the visits of ``values`` were."""
    first = visit_times[0] if isinstance(visit_times, (list, tuple)) else visit_times
    has_lengths = isinstance(first, (PackedRows, VisitValues))
    if values.packed and not has_lengths and np.ndim(visit_times) < 2:
        # of the order of the batch's rows, as beside a loss, or patient by patient, as here?
        raise TypeError(
            f"visit_times: expected {values.name}'s layout, PackedRows (or padded [B, V]), got one "
            "dimension, whose order is not known; PackedRows(times, batch) has that of the batch"
        )
    when = read_values("visit_times", visit_times, None if has_lengths else values.lengths)
    if len(when) != len(values) or (when.lengths != values.lengths).any():
        raise ValueError("visit_times: expected the visits of risk, got other lengths")
    return when


def last_visits(when: VisitValues, start: NDArray[Any]) -> Ints:
    """``[B]``: each patient's last visit at ``start`` or before; −1 where there is none. Of times
    that do not fall from visit to visit."""
    size = int(when.lengths.max())
    low, high = np.zeros(len(when), np.int64), when.lengths.copy()
    # bisection for all patients at once: reads the real visits alone
    for _ in range(size.bit_length()):
        open_ = low < high
        middle = (low + high) // 2
        earlier = np.zeros(len(when), np.bool_)
        chosen = np.flatnonzero(open_)
        earlier[chosen] = when.at(chosen, middle[chosen]) <= start[chosen]
        low = np.where(open_ & earlier, middle + 1, low)
        high = np.where(open_ & ~earlier, middle, high)
    return low - 1


def _known(
    patients: Ints,
    since: Floats,
    seen: Bools,
    any_event: Bools,
    horizon: float,
    with_censored: bool,
) -> tuple[Bools, Bools, Floats]:
    censoring = Censoring.fit(since, any_event, with_censored)
    at_horizon = float(censoring.seen(horizon))
    last = since.max()
    beyond = bool(horizon > last and (~any_event & (since == last)).any())
    if at_horizon <= 0 or beyond:
        raise ValueError(
            f"horizon: expected one that is observed, got {horizon:g} after the landmark, where "
            f"the last of {len(since)} patients at risk, patient {patients[since.argmax()]}, was "
            f"observed for {last:g} (Ĝ = 0)"
        )
    event = any_event & (since <= horizon)
    without = since > horizon
    if with_censored:
        without |= ~any_event & (since == horizon)
    weight = np.zeros(len(since))
    weight[event] = 1 / censoring.seen(since[event])
    weight[without] = 1 / at_horizon
    return event & seen, without | (event & ~seen), weight


def weighted_auc(found: AtLandmark, scores: NDArray[Any]) -> float:
    """Uno's AUC of scores ``[n]``."""
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise ImportError(
            "landmark_auc is computed by scikit-learn, which is not installed: "
            "pip install ehrseq_fast[metrics]"
        ) from error
    cases, controls = int(found.case.sum()), int(found.control.sum())
    if not cases or not controls:
        raise ValueError(
            f"horizon: expected cases and controls, got {cases} events within it and {controls} "
            f"patients known to be without, of {len(found.patients)} at risk at the landmark"
        )
    known = found.case | found.control
    return float(roc_auc_score(found.case[known], scores[known], sample_weight=found.weight[known]))


def squared_error(found: AtLandmark, risks: Floats) -> float:
    """The Brier score of probabilities ``[n]``."""
    return float((found.weight * (found.case - risks) ** 2).mean())
