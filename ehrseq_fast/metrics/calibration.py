"""Whether of those with a predicted risk of 20 % one in five has the event."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import ArrayLike, integer
from .landmark import AtLandmark, select
from .values import Floats, read_events, read_values

# Harrell's for four knots (Regression Modeling Strategies, 2015, section 2.4.6)
_KNOTS = (0.05, 0.35, 0.65, 0.95)
_CURVE = 51
_EDGE = 1e-7
_BINS = 2000


@dataclass(frozen=True)
class Calibration:
    """Predicted and observed risks within a horizon from a landmark.

    Attributes:
        horizon: w.
        n: patients at risk at the landmark.
        predicted, observed: ``[G]``, mean prediction and observed risk of each group of
            predictions.
        counts: ``[G]``, patients of each group.
        curve_predicted, curve_observed: the smoothed curve.
        mean_predicted, mean_observed: of all; their ratio is the calibration in the large.
        ici: integrated calibration index, the mean distance of curve and prediction over patients.
        e50, e90, emax: median, 90th centile and maximum of that distance.
        library: what fitted the curve.
    """

    horizon: float
    n: int
    predicted: list[float]
    observed: list[float]
    counts: list[int]
    curve_predicted: list[float]
    curve_observed: list[float]
    mean_predicted: float
    mean_observed: float
    ici: float
    e50: float
    e90: float
    emax: float
    library: str

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return asdict(self)

    def plot(self, axes: Any = None) -> Any:
        """The curve, the groups and the diagonal, on ``axes`` of matplotlib or new ones.

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
            axes = Figure(figsize=(4.5, 4.5), layout="constrained").subplots()
        top = 1.05 * max(*self.predicted, *self.observed, *self.curve_observed, 1e-6)
        axes.plot([0, top], [0, top], color="0.7", linewidth=1)
        axes.plot(self.curve_predicted, self.curve_observed, color="C0")
        axes.plot(self.predicted, self.observed, "o", color="C0")
        axes.set(
            xlim=(0, top),
            ylim=(0, top),
            xlabel="predicted risk",
            ylabel="observed risk",
            title=f"within {self.horizon:g}: ICI {self.ici:.3f}, n {self.n:,}",
        )
        return axes


def calibration(
    risk: Any,
    event_times: ArrayLike | None = None,
    event_indicators: ArrayLike | None = None,
    *,
    landmark: float | ArrayLike,
    horizon: float,
    visit_times: Any = None,
    lengths: ArrayLike | None = None,
    censored_visit: str = "excluded",
    groups: int = 10,
    event_types: ArrayLike | None = None,
    cause: int | None = None,
) -> Calibration:
    """The calibration curve of the risk within w from landmark s, and its ICI. 0 is best.

    The observed risk of a group is ``Σ case / Ĝ / Σ (case + control) / Ĝ``. The curve is a logistic
    regression, with these weights, of being a case on a restricted cubic spline (4 knots) of the
    logit of the prediction; the ICI is the mean over the patients at risk of the distance between
    curve and prediction. Source: Austin, Harrell and van Klaveren, Statistics in Medicine 39
    (2020), there with a spline in a hazard regression; weights make the binary outcome usable under
    censoring. Even a perfect model has an ICI of a few times 1/√cases.

    Of competing events that of ``cause``: the risk is its cumulative incidence within w. Without
    ties of events and censorings the observed one of all patients, ``mean_observed``, is then
    the Aalen–Johansen estimate.

    The curve is computed by scikit-learn's ``LogisticRegression``, the groups with NumPy.

    Args:
        groups: how many groups of equal size the predictions are cut into; fewer where they tie.

    All else and the errors as in :func:`~ehrseq_fast.metrics.brier`.

    Example:
        >>> import numpy as np
        >>> from ehrseq_fast.metrics import calibration
        >>> rng = np.random.default_rng(0)
        >>> risk = rng.uniform(size=5000)
        >>> days = rng.exponential(-365 / np.log1p(-risk))
        >>> found = calibration(risk, days, np.ones(5000), landmark=0, horizon=365)
        >>> found.ici < 0.02
        True
    """
    values = read_values("risk", risk, lengths)
    groups = integer("groups", groups, 1, 10_000)
    events = read_events(values, event_times, event_indicators, event_types, cause)
    found = select(values, events, landmark, horizon, visit_times, censored_visit)
    return calibrated(found, found.risks(values), horizon, groups)


def calibrated(found: AtLandmark, risks: Floats, horizon: float, groups: int = 10) -> Calibration:
    """Of patients at a landmark and their probabilities ``[n]``."""
    order = np.argsort(risks, kind="stable")
    case, risks, weight = found.case[order], risks[order].astype(np.float64), found.weight[order]
    n = len(risks)
    # ties are of one group
    cuts = np.searchsorted(risks, np.quantile(risks, np.linspace(0, 1, groups + 1)[1:-1]), "right")
    starts = np.unique([0, *cuts[cuts < n]])
    counts = np.diff(np.append(starts, n))
    predicted = np.add.reduceat(risks, starts) / counts
    weights = np.add.reduceat(weight, starts)
    cases = np.add.reduceat(weight * case, starts)
    kept = weights > 0
    # narrow bins of many predictions: the same figures, in a hundredth of the time
    bins = np.unique(np.linspace(0, n, min(n, _BINS) + 1).astype(np.int64)[:-1])
    sizes = np.diff(np.append(bins, n))
    x = np.add.reduceat(_logit(risks), bins) / sizes
    curve = np.linspace(0, len(bins) - 1, _CURVE).round().astype(np.int64)
    in_bins = [np.add.reduceat(w, bins) for w in (weight * case, weight * ~case)]
    smooth = _smoothed(x, *in_bins)
    binned = np.add.reduceat(risks, bins) / sizes
    distance = np.abs(smooth - binned)
    e50, e90, emax = _quantiles(distance, sizes, (0.5, 0.9, 1.0))
    return Calibration(
        horizon=float(horizon),
        n=n,
        predicted=predicted[kept].tolist(),
        observed=(cases[kept] / weights[kept]).tolist(),
        counts=counts[kept].tolist(),
        curve_predicted=binned[curve].tolist(),
        curve_observed=smooth[curve].tolist(),
        mean_predicted=float(risks.mean()),
        mean_observed=float(cases.sum() / weights.sum()),
        ici=float((distance * sizes).sum() / n),
        e50=e50,
        e90=e90,
        emax=emax,
        library="scikit-learn",
    )


def _smoothed(x: Floats, cases: Floats, others: Floats) -> Floats:
    """The observed risk at logits ``x`` of predictions, with the weights of cases and others."""
    basis = _spline(x)
    if not cases.any() or not others.any() or basis is None:
        return np.full(len(x), cases.sum() / (cases.sum() + others.sum()))
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            "calibration curves are fitted by scikit-learn, which is not installed: "
            "pip install ehrseq_fast[metrics]"
        ) from error
    weight = np.concatenate([cases, others])
    is_case = np.arange(len(weight)) < len(cases)
    kept = weight > 0
    fitted = LogisticRegression(C=1e6, max_iter=1000, solver="newton-cholesky")
    with warnings.catch_warnings():  # that it goes on by another method; a bad end still warns
        warnings.filterwarnings("ignore", ".*resort to lbfgs instead")
        fitted.fit(np.tile(basis, (2, 1))[kept], is_case[kept], sample_weight=weight[kept])
    return fitted.predict_proba(basis)[:, 1]


def _quantiles(values: Floats, counts: NDArray[Any], levels: tuple[float, ...]) -> list[float]:
    """Of values that stand for so many patients each."""
    order = np.argsort(values)
    upto = counts[order].cumsum()
    at = np.searchsorted(upto, np.array(levels) * upto[-1])
    return values[order][np.minimum(at, len(values) - 1)].tolist()


def _logit(risks: Floats) -> Floats:
    clipped = np.clip(risks, _EDGE, 1 - _EDGE)
    return np.log(clipped) - np.log1p(-clipped)


def _spline(x: Floats) -> Floats | None:
    """The basis ``[n, columns]`` of a restricted cubic spline of ``x``: linear in the tails; linear
    throughout where knots coincide. None where ``x`` is constant."""
    center, scale = x.mean(), x.std()
    if scale < 1e-9:
        return None
    z = (x - center) / scale
    knots = np.quantile(z, _KNOTS)
    columns = [z]
    if (np.diff(knots) > 1e-6).all():
        cubes = np.maximum(z[:, None] - knots, 0) ** 3
        last, before = knots[-1], knots[-2]
        over = last - before
        for j in range(len(knots) - 2):
            column = (
                cubes[:, j]
                - cubes[:, -2] * (last - knots[j]) / over
                + cubes[:, -1] * (before - knots[j]) / over
            )
            columns.append(column / (last - knots[0]) ** 2)
    return np.stack(columns, 1)
