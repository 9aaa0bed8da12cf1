"""Whether of those with a predicted risk of 20 % one in five has the event."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import ArrayLike, integer
from .landmark import AtLandmark, select
from .values import Floats, read_values

# Harrell's for four knots (Regression Modeling Strategies, 2015, section 2.4.6)
_KNOTS = (0.05, 0.35, 0.65, 0.95)
_CURVE = 51
_EDGE = 1e-7


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
            title=f"within {self.horizon:g}: ICI {self.ici:.3f}, {self.n:,} patients",
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
) -> Calibration:
    """The calibration curve of the risk within w from landmark s, and its ICI. 0 is best.

    The observed risk of a group is ``Σ case / Ĝ / Σ (case + control) / Ĝ``. The curve is a logistic
    regression, with these weights, of being a case on a restricted cubic spline (4 knots) of the
    logit of the prediction; the ICI is the mean over the patients at risk of the distance between
    curve and prediction. Source: Austin, Harrell and van Klaveren, Statistics in Medicine 39
    (2020), there with a spline in a hazard regression; weights make the binary outcome usable under
    censoring. Even a perfect model has an ICI of a few times 1/√cases.

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
    found = select(
        values, event_times, event_indicators, landmark, horizon, visit_times, censored_visit
    )
    return calibrated(found, found.risks(values), horizon, groups)


def calibrated(found: AtLandmark, risks: Floats, horizon: float, groups: int = 10) -> Calibration:
    """Of patients at a landmark and their probabilities ``[n]``."""
    edges = np.unique(np.quantile(risks, np.linspace(0, 1, groups + 1)[1:-1], method="lower"))
    group = np.searchsorted(edges, risks, "left")
    size = len(edges) + 1
    counts = np.bincount(group, minlength=size)
    weight = np.bincount(group, found.weight, minlength=size)
    cases = np.bincount(group, found.weight * found.case, minlength=size)
    sums = np.bincount(group, risks, minlength=size)
    kept = (counts > 0) & (weight > 0)
    curve = np.quantile(risks, np.linspace(0, 1, _CURVE))
    smooth = _smoothed(found, risks, np.concatenate([risks, curve]))
    distance = np.abs(smooth[: len(risks)] - risks)
    return Calibration(
        horizon=float(horizon),
        n=len(risks),
        predicted=(sums[kept] / counts[kept]).tolist(),
        observed=(cases[kept] / weight[kept]).tolist(),
        counts=counts[kept].tolist(),
        curve_predicted=curve.tolist(),
        curve_observed=smooth[len(risks) :].tolist(),
        mean_predicted=float(risks.mean()),
        mean_observed=float(cases.sum() / weight.sum()),
        ici=float(distance.mean()),
        e50=float(np.median(distance)),
        e90=float(np.quantile(distance, 0.9)),
        emax=float(distance.max()),
        library="scikit-learn",
    )


def _smoothed(found: AtLandmark, risks: Floats, at: Floats) -> Floats:
    """The observed risk by the predicted one, at these predictions."""
    known = found.weight > 0
    case, weight = found.case[known], found.weight[known]
    mean = float((weight * case).sum() / weight.sum())
    basis = _spline(_logit(risks[known]))
    if case.all() or not case.any() or basis is None:
        return np.full(len(at), mean)
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            "calibration curves are fitted by scikit-learn, which is not installed: "
            "pip install ehrseq_fast[metrics]"
        ) from error
    fitted = LogisticRegression(C=1e6, max_iter=1000, solver="newton-cholesky")
    fitted.fit(basis(_logit(risks[known])), case, sample_weight=weight)
    return fitted.predict_proba(basis(_logit(at)))[:, 1]


def _logit(risks: Floats) -> Floats:
    clipped = np.clip(risks, _EDGE, 1 - _EDGE)
    return np.log(clipped) - np.log1p(-clipped)


def _spline(x: Floats) -> Any:
    """A function to the basis of a restricted cubic spline of ``x``: linear in the tails; linear
    throughout where knots coincide. None where ``x`` is constant."""
    center, scale = x.mean(), x.std()
    if scale < 1e-9:
        return None
    knots = np.quantile((x - center) / scale, _KNOTS)

    def basis(values: Floats) -> NDArray[Any]:
        z = (values - center) / scale
        columns = [z]
        if (np.diff(knots) > 1e-6).all():
            cubes = np.maximum(z[:, None] - knots, 0) ** 3
            last, before = knots[-1], knots[-2]
            for j in range(len(knots) - 2):
                over = last - before
                column = (
                    cubes[:, j]
                    - cubes[:, -2] * (last - knots[j]) / over
                    + cubes[:, -1] * (before - knots[j]) / over
                )
                columns.append(column / (last - knots[0]) ** 2)
        return np.stack(columns, 1)

    return basis
