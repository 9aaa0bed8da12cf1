"""Cumulative incidences that a model predicts beside those that were observed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import ArrayLike, integer
from .causes import at_risk_by_visit
from .values import (
    Floats,
    Ints,
    VisitValues,
    included,
    read_entry_times,
    read_types,
    read_values,
    read_visit_times,
)

LIFELINES = "lifelines"
_SLACK = 1e-5  # how far above 1 rounding may take a sum of hazards
FEWEST = 10  # patients at risk at a visit


@dataclass(frozen=True)
class IncidenceCurves:
    """Predicted and observed cumulative incidence of each cause, by visit.

    Attributes:
        causes: K names.
        visits: V visit indices.
        at_risk: ``[V]``, patients at risk at each.
        predicted, observed: ``[K][V]``, the probability of an event of the cause by that visit.
        low, high: ``[K][V]``, pointwise 95 % interval of the observed one.
        library: what estimated it.
    """

    causes: tuple[str, ...]
    visits: list[int]
    at_risk: list[int]
    predicted: list[list[float]]
    observed: list[list[float]]
    low: list[list[float]]
    high: list[list[float]]
    library: str = LIFELINES

    @property
    def largest_difference(self) -> list[float]:
        """``[K]``: the largest distance of both curves."""
        return np.abs(np.array(self.predicted) - self.observed).max(1).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return asdict(self) | {
            "causes": list(self.causes),
            "largest_difference": self.largest_difference,
        }

    def plot(self, axes: Any = None) -> Any:
        """Both curves of each cause by visit, on ``axes`` of matplotlib or new ones.

        Raises:
            ImportError: where matplotlib is not installed.
        """
        if axes is None:
            try:
                from matplotlib.figure import Figure
            except ImportError as error:
                raise ImportError(
                    "plots are drawn by matplotlib, which is not installed: "
                    "pip install ehrseq_fast[train]"
                ) from error
            axes = Figure(figsize=(6, 4.5), layout="constrained").subplots()
        visits = np.array(self.visits) + 1
        for k, cause in enumerate(self.causes):
            color = f"C{k}"
            axes.fill_between(visits, self.low[k], self.high[k], color=color, alpha=0.2, lw=0)
            axes.step(visits, self.observed[k], color=color, where="mid", lw=1)
            axes.plot(visits, self.predicted[k], color=color, ls="--", label=f"{cause}, predicted")
            axes.plot([], [], color=color, lw=1, label=f"{cause}, Aalen–Johansen (95 %)")
        axes.set(xlabel="visit", ylabel="cumulative incidence")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        return axes


def incidence_curves(
    hazards: Any,
    event_times: ArrayLike | None = None,
    event_types: ArrayLike | None = None,
    *,
    lengths: ArrayLike | None = None,
    entry_times: ArrayLike | None = None,
    censored_visit: str = "excluded",
    causes: Sequence[str] | None = None,
    fewest: int = FEWEST,
) -> IncidenceCurves:
    """The calibration of cumulative incidences: those predicted beside the Aalen–Johansen estimate.

    The predicted one is ``F_k(t) = Σ_{u≤t} S(u−1) h̄_k(u)`` with ``S(u) = Π_{v≤u} (1 − Σ_k h̄_k(v))``
    and ``h̄_k(u)`` the mean of the predicted hazards of those who are at risk at u. Hazards change
    with what happens to a patient, and after the last visit there are none, so the mean of the
    patients' own incidences is that of no population. Under independent censoring both curves
    estimate the same where the hazards are calibrated.

    The observed one is computed by lifelines' ``AalenJohansenFitter``, from counts by visit whose
    ties are broken beforehand (lifelines breaks them at random): censorings come half a visit after
    the events of their visit with ``censored_visit="included"``, half a visit before with
    ``"excluded"``. Events of one visit have no order, which the estimate does not depend on.

    Args:
        hazards: cause-specific hazards at each visit that sum to at most 1: ``[B, V, K]`` padded,
            ``[n_visits, K]`` patient by patient with ``lengths``,
            :class:`~ehrseq_fast.PackedRows` or a list of them. Incidences ``[B, V, K]``, predicted
            at the first visit, are made hazards by ``predictions.hazards_from_incidence``.
        event_times: ``[B]``, the visit of event or censoring, counted from 0.
        event_types: ``[B]``, 0 censored, 1 to K the cause of the event.
        lengths: ``[B]``, visits of each patient.
        entry_times: ``[B]``, the first visit at risk.
        censored_visit: what the visit of a censoring says, as in the losses.
        causes: K names; by default ``"cause 1"``, ...
        fewest: the curves span the visits from the first at which as many are at risk to the last
            before fewer are, and count from there.

    Raises:
        ValueError: for shapes and outcomes as the other metrics have it, types above K, hazards
            outside [0, 1] or with a sum above 1, with the first patient at fault; nowhere as many
            at risk as ``fewest``.
        TypeError: where outcomes are missing.
        ImportError: where lifelines is not installed.

    Example:
        >>> import numpy as np
        >>> from ehrseq_fast.metrics import incidence_curves
        >>> hazards = np.broadcast_to([0.25, 0.125], (4, 3, 2))
        >>> found = incidence_curves(hazards, [0, 1, 2, 2], [1, 0, 2, 1], fewest=2)
        >>> [round(x, 3) for x in found.observed[0]]  # 1 of 4, then none of 2, then 1 of 2
        [0.25, 0.25, 0.625]
        >>> [round(x, 3) for x in found.predicted[0]]
        [0.25, 0.406, 0.504]
    """
    values = read_values("hazards", hazards, lengths, trailing=1)
    n_causes = values.values.shape[1]
    names = cause_names(causes, n_causes)
    times, types = read_types(values, event_times, event_types, n_causes)
    visits = read_visit_times(values, times)
    entry = read_entry_times(values, entry_times, visits)
    patients = Patients.of(values, visits, types, entry, included(censored_visit))
    return curves(patients, names, patients.span(integer("fewest", fewest, 1, 2**31)))


def curves(patients: Patients, causes: tuple[str, ...], span: tuple[int, int]) -> IncidenceCurves:
    """Both curves of patients that were checked, at the visits of a span."""
    low_high: list[NDArray[Any]] = []
    observed = aalen_johansen(patients, span, low_high)
    predicted, at_risk = patients.predicted(patients.hazards, span)
    low, high = low_high
    return IncidenceCurves(
        causes,
        list(range(*span)),
        at_risk.tolist(),
        predicted.T.tolist(),
        observed.T.tolist(),
        low.T.tolist(),
        high.T.tolist(),
    )


def cause_names(causes: Sequence[str] | None, n_causes: int) -> tuple[str, ...]:
    """Names of the causes, one for each.

    Raises:
        ValueError: for another number of names.
    """
    if causes is None:
        return tuple(f"cause {k + 1}" for k in range(n_causes))
    names = tuple(str(cause) for cause in causes)
    if len(names) != n_causes or len(set(names)) != n_causes:
        raise ValueError(f"causes: expected {n_causes} different names, got {list(names)}")
    return names


@dataclass(frozen=True)
class Patients:
    """Hazards at the visits that are at risk, one patient after the other, and outcomes.

    Attributes:
        hazards: ``[n, K]`` of visits 0 to T of each patient.
        starts, visits, types, entry: ``[B]``; visit t of patient i is row ``starts[i] + t``.
        with_censored: whether the visit of a censoring was survived.
    """

    hazards: Floats
    starts: Ints
    visits: Ints
    types: Ints
    entry: Ints
    with_censored: bool

    @classmethod
    def of(
        cls,
        values: VisitValues,
        visits: Ints,
        types: Ints,
        entry: Ints | None,
        with_censored: bool,
    ) -> Patients:
        """Read and check the hazards up to each patient's time.

        Raises:
            ValueError: for hazards outside [0, 1] or with a sum above 1, no patient.
        """
        if not len(visits):
            raise ValueError("event_times: expected at least one patient, got none")
        sizes = visits + 1
        starts = sizes.cumsum() - sizes
        of = np.repeat(np.arange(len(visits)), sizes)
        visit = np.arange(len(of)) - starts[of]
        found = values.at(of, visit).astype(np.float64)
        wrong = ~((found >= 0) & (found <= 1)).all(1) | (found.sum(1) > 1 + _SLACK)
        if wrong.any():
            first = int(wrong.argmax())
            raise ValueError(
                f"hazards: expected K probabilities in [0, 1] with a sum of at most 1, got "
                f"{found[first].tolist()} (patient {of[first]}, visit {visit[first]}; "
                f"{int(wrong.sum())} visits in all)"
            )
        entry = np.zeros(len(visits), np.int64) if entry is None else entry
        return cls(found, starts, visits, types, entry, with_censored)

    def take(self, chosen: Ints) -> Patients:
        """Some of them, who may be repeated; the hazards are not copied."""
        return Patients(
            self.hazards,
            self.starts[chosen],
            self.visits[chosen],
            self.types[chosen],
            self.entry[chosen],
            self.with_censored,
        )

    def rows_at_risk(self) -> tuple[Ints, Ints]:
        """Rows of the hazards of the visits that count, and which visits they are."""
        counted = self.visits + ((self.types > 0) | self.with_censored) - self.entry
        of = np.repeat(np.arange(len(counted)), counted)
        visit = np.arange(len(of)) - np.repeat(counted.cumsum() - counted - self.entry, counted)
        return self.starts[of] + visit, visit

    def span(self, fewest: int) -> tuple[int, int]:
        """The first visits, one after the other, at which so many are at risk.

        Raises:
            ValueError: where there is none.
        """
        size = int(self.visits.max()) + 1
        entry, with_censored = self.entry, self.with_censored
        at_risk = at_risk_by_visit(self.visits, self.types > 0, entry, with_censored, size)
        enough = np.append(at_risk >= fewest, False)
        if not enough.any():
            raise ValueError(
                f"fewest: expected a visit with {fewest} patients at risk, got at most "
                f"{at_risk.max()}"
            )
        first = int(enough.argmax())
        return first, first + int((~enough[first:]).argmax())

    def predicted(self, hazards: Floats, span: tuple[int, int]) -> tuple[Floats, Ints]:
        """``[V, K]``: the incidences by the mean hazards of those at risk, and ``[V]``, how many
        these are. ``hazards`` in place of the patients' own."""
        rows, visit = self.rows_at_risk()
        inside = (visit >= span[0]) & (visit < span[1])
        rows, visit = rows[inside], visit[inside] - span[0]
        size = span[1] - span[0]
        at_risk = np.bincount(visit, minlength=size)
        means = (
            np.stack([np.bincount(visit, column, size) for column in hazards[rows].T], 1)
            / np.maximum(at_risk, 1)[:, None]
        )
        survival = np.concatenate([[1.0], (1 - means.sum(1)).cumprod()[:-1]])
        return (survival[:, None] * means).cumsum(0), at_risk


def aalen_johansen(
    patients: Patients, span: tuple[int, int], interval: list[NDArray[Any]] | None = None
) -> Floats:
    """``[V, K]``: the estimate of the incidences at the visits of a span, of those who are without
    an event at its first one. ``interval`` is given its pointwise limits, ``[V, K]`` each."""
    try:
        from lifelines import AalenJohansenFitter
    except ImportError as error:
        raise ImportError(
            "the Aalen–Johansen estimate is computed by lifelines, which is not installed: "
            "pip install ehrseq_fast[metrics]"
        ) from error
    n_causes = patients.hazards.shape[1]
    entry = np.maximum(patients.entry, span[0])
    there = (patients.visits >= span[0]) & (patients.visits >= entry)
    columns = np.stack([x[there] for x in (entry, patients.visits, patients.types)])
    (entry, visits, types), counts = np.unique(columns, axis=1, return_counts=True)
    size = span[1] - span[0]
    if not len(counts):
        return np.zeros((size, n_causes))
    shift = 0.5 if patients.with_censored else -0.5
    # events of one visit in the order of their causes: of distinct times lifelines has no tie to
    # break, for which it would draw from NumPy's global generator
    times = visits + np.where(types > 0, types / (4 * (n_causes + 1)), shift) + 1.0
    at = np.arange(*span) + 1.25
    result, limits = np.zeros((size, n_causes)), np.zeros((2, size, n_causes))
    for cause in range(1, n_causes + 1):
        fitted = AalenJohansenFitter(calculate_variance=interval is not None)
        with np.errstate(all="ignore"):  # the variance where nobody is left
            fitted.fit(times, types, cause, entry=entry + 0.25, weights=counts)
        found = fitted.cumulative_density_
        place = np.searchsorted(found.index.to_numpy(), at, "right") - 1
        result[:, cause - 1] = found.iloc[:, 0].to_numpy()[place]
        if interval is not None:
            both = fitted.confidence_interval_.to_numpy()[place]  # in lifelines' order, or not
            both = np.where(np.isnan(both), result[:, cause - 1, None], both)
            limits[:, :, cause - 1] = both.min(1), both.max(1)
    if interval is not None:
        interval += list(limits)
    return result
