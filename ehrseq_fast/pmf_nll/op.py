"""The losses of a probability mass over time: what they take, and the choice of backend."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..batch import PackedVisits
from ..checks import expect_option
from ..rows import PackedRows
from ..survival_nll.fused import Inputs, Rows
from ..survival_nll.logits import loss_of_logits
from ..survival_nll.operators import REDUCTIONS
from ..survival_nll.options import CENSORED_VISITS
from . import (
    operators,  # noqa: F401  (which defines what is called here)
    reference,
)


class PmfNll(NamedTuple):
    """The options of the loss, and what computes it (:class:`~..survival_nll.fused.Loss`)."""

    competing: bool = False
    censored_visit: str = "included"
    reduction: str = "mean"

    def check(self) -> None:
        """``ValueError`` for unknown options."""
        expect_option("censored_visit", self.censored_visit, CENSORED_VISITS)
        expect_option("reduction", self.reduction, REDUCTIONS)

    def define(self, inputs: Inputs) -> Tensor:
        logits, times, types, mask, entry_times, sample_weight = inputs
        return reference.pmf_nll(
            logits,
            times,
            types,
            mask,
            censored_visit=self.censored_visit,
            reduction=self.reduction,
            entry_times=entry_times,
            sample_weight=sample_weight,
        )

    def compute(self, ops: Any, rows: Rows, inputs: Inputs, needs_grad: bool) -> Any:
        included = self.censored_visit == "included"
        numbered = (self.competing, included, REDUCTIONS[self.reduction], needs_grad)
        return ops.pmf_nll.default(*inputs[:4], *rows, *inputs[4:], *numbered)


def pmf_nll(
    logits: Tensor | PackedRows,
    event_times: Tensor | PackedVisits | None = None,
    event_indicators: Tensor | None = None,
    sequence_mask: Tensor | None = None,
    *,
    censored_visit: str = "included",
    entry_times: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    r"""Negative log-likelihood of a probability mass over time: a softmax over a patient's visits
    and the class "beyond" them, whose logit is 0.

    Per patient, with :math:`p = \mathrm{softmax}(x_0, ..., x_{V-1}, 0)`, event time :math:`T`, and
    :math:`\delta = 1` where the event was seen, 0 where the patient was censored:

    .. math:: -\delta \log p_T - (1 - \delta) \log \sum_{t > T} p_t

    the sum including "beyond"; ``censored_visit="excluded"`` sums over :math:`t \ge T`, as the
    visit of censoring then says nothing. With an entry time e all is given :math:`t \ge e`: the
    softmax is over what is left. Computed as :math:`\log(1 + e^d)` with d a difference of two
    log-sum-exps: exact for any logits, without an epsilon.

    Source: Lee, Zame, Yoon and van der Schaar, DeepHit (AAAI 2018); Kvamme and Borgan, Continuous
    and discrete-time survival prediction with neural networks (Lifetime Data Analysis 27, 2021);
    pycox's ``nll_pmf``, whose sums have 1e-7 added in the logarithm.

    Args:
        logits: ``[B, V]`` float32, float64, bfloat16 or float16. Or
            :class:`~ehrseq_fast.PackedRows` ``[n_visits]``, whose batch has the outcomes where none
            are given.
        event_times: ``[B]`` integer: the visit of event or censoring, counted from 0.
        event_indicators: ``[B]`` bool or number: 1 event seen, 0 censored.
        sequence_mask: ``[B, V]`` bool or number: 1 on a patient's visits, 0 on the padding after
            them, which is never read: what comes after the last visit is "beyond". Without it
            every slot is a visit.
        censored_visit: whether the visit of censoring was survived: ``"included"``, as in pycox
            (and unlike the default of the losses of hazards), or ``"excluded"``.
        entry_times: ``[B]`` integer: the first visit at risk (left truncation); 0 without it.
        sample_weight: ``[B]``, not negative: multiplies each patient's loss; one that requires a
            gradient is refused.
        reduction: ``"mean"`` over the patients (nan for B = 0), ``"sum"``, or ``"none"``: ``[B]``.
        validate: check values on a GPU too, at the price of a synchronisation.

    Returns:
        The loss, float64 for float64 and float32 otherwise. A logit of -inf is a visit at which the
        event cannot be. Second derivatives, forward mode and the transforms of ``torch.func`` are
        computed by the plain PyTorch definition.

    Raises:
        ValueError: for shapes or devices that do not fit, unknown options, masks with holes,
            patients without visits, event times outside a patient's visits, entry times after
            them, indicators other than 0 and 1, negative weights.
        TypeError: for dtypes, and missing outcomes.

    Example:
        >>> import torch
        >>> from ehrseq_fast import pmf_nll
        >>> logits = torch.zeros(2, 3)  # 1/4 at each visit, and 1/4 beyond
        >>> pmf_nll(logits, torch.tensor([1, 1]), torch.tensor([1, 0]), reduction="none")
        tensor([1.3863, 0.6931])
    """
    loss = PmfNll(False, censored_visit, reduction)
    others = (sequence_mask, entry_times, sample_weight)
    return loss_of_logits("pmf_nll", loss, logits, event_times, event_indicators, others, validate)


def pmf_competing_risks_nll(
    logits: Tensor | PackedRows,
    event_times: Tensor | PackedVisits | None = None,
    event_types: Tensor | None = None,
    sequence_mask: Tensor | None = None,
    *,
    censored_visit: str = "included",
    entry_times: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    r""":func:`pmf_nll` with K competing events: one softmax over visits, causes and "beyond".

    .. math:: -[k > 0] \log p_{T,k} - [k = 0] \log \sum_{t > T} \sum_j p_{t,j}

    Args:
        logits: ``[B, V, K]``, or :class:`~ehrseq_fast.PackedRows` ``[n_visits, K]``.
        event_times: ``[B]`` integer: the visit of event or censoring, counted from 0.
        event_types: ``[B]`` integer: 0 censored, 1..K the cause of the event.

    All else as for :func:`pmf_nll` (pycox's ``nll_pmf_cr``, whose logits are ``[B, K, V]``).

    Example:
        >>> import torch
        >>> from ehrseq_fast import pmf_competing_risks_nll
        >>> logits = torch.zeros(1, 2, 2)  # 1/5 for each of two causes at two visits, and beyond
        >>> pmf_competing_risks_nll(logits, torch.tensor([0]), torch.tensor([0]))
        tensor(0.5108)
    """
    loss = PmfNll(True, censored_visit, reduction)
    others = (sequence_mask, entry_times, sample_weight)
    return loss_of_logits("pmf_nll", loss, logits, event_times, event_types, others, validate)
