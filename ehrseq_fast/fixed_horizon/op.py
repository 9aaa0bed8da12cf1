"""Binary cross-entropy of "the event comes within the horizon": arguments checked, backend chosen,
gradient attached."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .. import backend
from ..autograd import transformed
from ..backend import must_check_values
from ..batch import PackedVisits
from ..checks import INTEGER, expect_option
from ..rows import PackedRows
from ..rows.beside import values_beside, with_batch
from ..survival_nll.checks import check_hazards, require_outcomes, vmapped
from ..survival_nll.fused import PADDED, nll, nll_on_host
from ..survival_nll.operators import REDUCTIONS
from ..visitwise import Visits, check_companions, check_weights, layout_of
from . import (
    operators,  # noqa: F401  (which defines what is called here)
    reference,
)
from .checks import check_horizon, check_outcomes, check_pos_weight, check_values


class HorizonBCE(NamedTuple):
    """The options of the loss, and what computes it (:class:`~..survival_nll.fused.Loss`)."""

    horizon: float
    pos_weight: float = 1.0
    reduction: str = "mean"

    def check(self) -> None:
        """``ValueError`` for unknown options."""
        check_horizon(self.horizon)
        check_pos_weight(self.pos_weight)
        expect_option("reduction", self.reduction, REDUCTIONS)

    def define(self, inputs: Any) -> Tensor:
        logits, times, seen, *visits, visit_times, visit_weight, sample_weight = inputs
        return reference.fixed_horizon_bce(
            logits,
            times,
            seen,
            Visits(*visits),
            visit_times,
            float(self.horizon),
            pos_weight=float(self.pos_weight),
            visit_weight=visit_weight,
            sample_weight=sample_weight,
            reduction=self.reduction,
        )

    def compute(self, ops: Any, rows: Any, inputs: Any, needs_grad: bool) -> Any:
        numbered = (float(self.horizon), float(self.pos_weight), REDUCTIONS[self.reduction])
        return ops.fixed_horizon_bce.default(*inputs, *numbered, needs_grad)


class MaskedBCE(NamedTuple):
    """Of labels that are given; inputs are logits, labels and weights ``[B, V]``."""

    def check(self) -> None:
        """There are no options."""

    def define(self, inputs: Any) -> Tensor:
        return reference.masked_bce(*inputs)

    def compute(self, ops: Any, rows: Any, inputs: Any, needs_grad: bool) -> Any:
        return ops.masked_bce.default(*inputs, needs_grad)


def fixed_horizon_bce(
    logits: Tensor | PackedRows,
    event_times: Tensor | PackedVisits | None = None,
    event_indicators: Tensor | None = None,
    horizon: float = 1.0,
    sequence_mask: Tensor | None = None,
    *,
    visit_times: Tensor | None = None,
    pos_weight: float | None = None,
    visit_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    r"""Binary cross-entropy of "the event comes within the horizon" at every visit, with labels
    made from event times inside the kernel.

    With labels :math:`y_n` of the visits whose label is known (:func:`fixed_horizon_labels` says
    which, and is the definition: censored within the horizon, at or after the event or censoring,
    they are left out), and weights :math:`w_n` (``visit_weight`` times the patient's
    ``sample_weight``):

    .. math:: \frac{\sum_n w_n \big(-p\, y_n \log \sigma(x_n)
              - (1 - y_n) \log(1 - \sigma(x_n))\big)}{\sum_n w_n}

    with :math:`p` = ``pos_weight``, as ``binary_cross_entropy_with_logits`` of the visits that
    count. Visits that end in censoring are left out rather than weighted, so what is learnt is the
    risk among those who stay in observation.

    Args:
        logits: ``[B, V]`` float32, float64, bfloat16 or float16. Or
            :class:`~ehrseq_fast.PackedRows` ``[n_visits]``, whose batch has the outcomes in visits
            where none are given.
        event_times: ``[B]``: the visit of event or censoring, counted from 0, an integer, which may
            lie past the patient's last visit; with ``visit_times`` its time on the same axis
            (days), of any real dtype.
        event_indicators: ``[B]`` bool or number: 1 event seen, 0 censored.
        horizon: one number above 0, in visits or in the unit of ``visit_times``.
        sequence_mask: ``[B, V]`` bool or number: 1 on a patient's visits, 0 on the padding after
            them. Without it every slot is a visit. A patient may have none.
        visit_times: ``[B, V]`` or ``[n_visits]``: the time of each visit, of any real dtype; times
            are compared in float64. Without it visit t is at the time t.
        pos_weight: what the terms of label 1 are multiplied by, a number from 0; the mean's
            denominator stays.
        visit_weight: ``[B, V]`` or ``[n_visits]``, at least 0 at visits.
        sample_weight: ``[B]``, at least 0. A weight that requires a gradient is refused. A NaN or
            an infinity in a weight shows in loss and gradient, as everything of a visit that
            counts; of visits that do not, weights are not read either.
        reduction: ``"mean"`` as above, 0 where no visit counts; ``"sum"``; or ``"none"``:
            ``[B, V]`` or ``[n_visits]``, 0 where nothing counts.
        validate: check values on a GPU too, at the price of a synchronisation.

    Returns:
        The loss, float64 for float64 and float32 otherwise. The gradient has the dtype of
        ``logits`` and is 0 where nothing counts, even if that holds a NaN. Second derivatives,
        forward mode and the transforms of ``torch.func`` are computed by the plain PyTorch
        definition.

    Raises:
        ValueError: for shapes or devices that do not fit, unknown options, masks with holes, times
            that are NaN, negative visits, indicators other than 0 and 1, negative weights, a
            horizon that is not above 0.
        TypeError: for dtypes, missing outcomes, and event times in floating point without
            ``visit_times``.

    Example:
        >>> import torch
        >>> from ehrseq_fast import fixed_horizon_bce
        >>> days = torch.tensor([[0.0, 100.0, 300.0]])
        >>> fixed_horizon_bce(
        ...     torch.zeros(1, 3),
        ...     torch.tensor([390.0]),
        ...     torch.tensor([1]),
        ...     180,
        ...     visit_times=days,
        ...     reduction="none",
        ... )
        tensor([[0.6931, 0.6931, 0.6931]])
    """
    times: Any
    logits, times = with_batch(logits, event_times, "logits")
    visit_times = values_beside(logits, visit_times, "visit_times")
    visit_weight = values_beside(logits, visit_weight, "visit_weight")
    if isinstance(logits, PackedRows):
        batch = logits.batch
        if visit_times is None and times is None:
            times = batch.event_times
        event_indicators = batch.event_indicators if event_indicators is None else event_indicators
    logits, visits, patients = layout_of(logits, sequence_mask)
    loss = HorizonBCE(horizon, 1.0 if pos_weight is None else pos_weight, reduction)
    of_visits = (visit_times, visit_weight, sample_weight)
    inputs: Any = (logits, times, event_indicators, *visits, *of_visits)
    if visit_times is not None or (isinstance(times, Tensor) and times.dtype in INTEGER):
        dims = 1 if visits.packed else 2
        weights = (visit_weight, sample_weight)
        value = nll_on_host("fixed_horizon_bce", dims, loss, PADDED, inputs, weights)
        if value is not None:
            return value
    times, event_indicators = require_outcomes(event_times=times, event_indicators=event_indicators)
    check_hazards(logits, ("n_visits",) if visits.packed else ("B", "V"), "logits")
    patients = logits.shape[0] if patients is None else patients
    outcomes = (times, event_indicators, visit_times)
    check_outcomes(logits, "logits", visits, patients, *outcomes)
    check_companions(logits, visits, patients, visit_weight, sample_weight)
    loss.check()
    device = logits.device.type
    chosen = backend.choose("fixed_horizon_bce", device, logits.dtype)
    if transformed(logits, visit_weight, sample_weight):
        chosen = "reference"
    if must_check_values(chosen, device, validate) and not vmapped():
        check_values(visits, *outcomes)
        check_weights(visits, visit_weight, sample_weight)
    return nll(chosen, PADDED, inputs, loss)
