"""The survival losses as functions of padded hazards: what they take, and the choice of backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..autograd import transformed
from ..backend import must_check_values
from ..batch import PackedVisits
from ..checks import INTEGER, REAL
from ..rows import PackedRows
from ..rows.beside import with_batch
from ..visit_weighted_nll.op import survival_on_host, weighted_nll
from .checks import (
    check_link,
    check_outcomes,
    check_probabilities,
    check_single_link,
    check_tensors,
    fits_link,
    refuse_mask,
    require_outcomes,
)
from .fused import PADDED, Inputs, SurvivalNll, nll
from .packed import packed_competing_risks_nll, packed_survival_nll


def discrete_time_survival_nll(
    hazards: Tensor | PackedRows,
    event_times: Tensor | PackedVisits | None = None,
    event_indicators: Tensor | None = None,
    sequence_mask: Tensor | None = None,
    *,
    from_logits: bool = False,
    link: str = "sigmoid",
    censored_visit: str = "excluded",
    entry_times: Tensor | None = None,
    sample_weight: Tensor | None = None,
    visit_weight: Tensor | PackedRows | None = None,
    eps: float = 1e-7,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    r"""Negative log-likelihood of discrete-time survival: one hazard per visit, one event at most.

    Per patient, with hazards :math:`h_t`, event time :math:`T`, and :math:`\delta = 1` where the
    event was seen, 0 where the patient was censored:

    .. math:: -\sum_{entry \le t < T} \log(1 - h_t) - \delta \log h_T
              - (1 - \delta)\, c \log(1 - h_T)

    with :math:`c = 0` for ``censored_visit="excluded"`` (the visit of censoring says nothing) and
    :math:`c = 1` for ``"included"`` (it was survived, as in pycox's ``nll_logistic_hazard``).
    Source: Singer and Willett, Applied Longitudinal Data Analysis (2003), chapter 11; Tutz and
    Schmid, Modeling Discrete Time-to-Event Data (2016).

    Args:
        hazards: ``[B, V]`` float32, float64, bfloat16 or float16: probabilities in [0, 1], clamped
            to ``[eps, 1 - eps]``, or logits with ``from_logits=True`` (never clamped). Or
            :class:`~ehrseq_fast.PackedRows`, as the models give them for a packed batch: then as
            :func:`packed_survival_nll`, without a mask. Their batch has the outcomes, or a batch
            that is given in the place of ``event_times``: ``loss(rows, batch)``.
        link: of logits: ``"sigmoid"``, or ``"cloglog"``: h = 1 - exp(-e^x), whose coefficients are
            those of proportional hazards in continuous time grouped into visits (Prentice and
            Gloeckler, Biometrics 34, 1978). There the loss of a survived visit is e^x, which
            overflows where x is above 88 (709 in float64).
        event_times: ``[B]`` integer: the visit of event or censoring, counted from 0.
        event_indicators: ``[B]`` bool or number: 1 event seen, 0 censored.
        sequence_mask: ``[B, V]`` bool or number: 1 on a patient's visits, 0 on the padding after
            them. Without it every slot is a visit, so there must be no padding, or it must come
            after the event time.
        entry_times: ``[B]`` integer: the first visit at risk (left truncation); 0 without it.
        sample_weight: ``[B]``, not negative: multiplies each patient's loss. A NaN or an infinity
            is not refused, so that it shows in the loss. No gradient flows to it in a backward
            pass, so one that requires a gradient is refused.
        visit_weight: ``[B, V]`` (of packed rows ``[n_visits]`` or PackedRows) floating: multiplies
            each visit's term. Not negative where a visit is read; what it has elsewhere changes
            nothing, even a NaN. One that requires a gradient is refused as ``sample_weight`` is;
            ``torch.func.grad`` differentiates by it.
        reduction: ``"mean"`` over the patients (always divided by B, whatever the weights; nan for
            B = 0, as ``torch.mean``), ``"sum"``, or ``"none"`` for ``[B]``.
        validate: check values on a GPU too, at the price of a synchronisation.

    Returns:
        The loss, float64 for float64 and float32 otherwise: a sum over many visits would overflow
        16 bits. The gradient has the dtype of ``hazards``; it is 0 where a hazard was clamped and
        at every visit that is not at risk, even if that holds a NaN. Second derivatives, forward
        mode and the transforms of ``torch.func`` (``vmap``, ``jvp``, ``hessian``, ...) are right:
        they are computed by the plain PyTorch definition. Under ``vmap`` values are not checked.

    Raises:
        ValueError: for shapes or devices that do not fit, unknown options, masks with holes or
            values other than 0 and 1, patients without visits, event times outside a patient's
            visits, entry times after them, indicators other than 0 and 1, negative weights, and
            hazards outside [0, 1] at visits that are read (a NaN is not refused, and shows in the
            loss).
        TypeError: for dtypes, event times in floating point among them, and missing outcomes.

    Example:
        >>> import torch
        >>> from ehrseq_fast.survival_nll import discrete_time_survival_nll
        >>> hazards = torch.tensor([[0.1, 0.2, 0.5], [0.1, 0.3, 0.9]])
        >>> times, seen = torch.tensor([2, 1]), torch.tensor([1, 0])
        >>> mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> discrete_time_survival_nll(hazards, times, seen, mask, reduction="none")
        tensor([1.0217, 0.1054])
    """
    times: Any
    hazards, times = with_batch(hazards, event_times, "hazards")
    if isinstance(hazards, PackedRows):
        if sequence_mask is not None:
            refuse_mask(sequence_mask)
        return packed_survival_nll(
            hazards,
            event_times=times,
            event_indicators=event_indicators,
            from_logits=from_logits,
            link=link,
            censored_visit=censored_visit,
            entry_times=entry_times,
            sample_weight=sample_weight,
            visit_weight=visit_weight,
            eps=eps,
            reduction=reduction,
            validate=validate,
        )
    options = SurvivalNll(link if from_logits else "probabilities", censored_visit, eps, reduction)
    inputs: Any = (hazards, times, event_indicators, sequence_mask, entry_times, sample_weight)
    if fits_link(link, from_logits):
        value = survival_on_host("survival_nll", 2, options, PADDED, inputs, visit_weight)
        if value is not None:
            return value
    times, event_indicators = require_outcomes(event_times=times, event_indicators=event_indicators)
    check_tensors(
        hazards,
        ("B", "V"),
        times,
        ("event_indicators", event_indicators, REAL),
        sequence_mask,
        entry_times,
        sample_weight,
    )
    check_single_link(link, from_logits)
    return _nll(inputs, options, visit_weight, validate)


def competing_risks_nll(
    hazards: Tensor | PackedRows,
    event_times: Tensor | PackedVisits | None = None,
    event_types: Tensor | None = None,
    sequence_mask: Tensor | None = None,
    *,
    from_logits: bool = False,
    link: str = "sigmoid",
    censored_visit: str = "excluded",
    entry_times: Tensor | None = None,
    sample_weight: Tensor | None = None,
    visit_weight: Tensor | PackedRows | None = None,
    eps: float = 1e-7,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    r"""Negative log-likelihood of discrete-time survival with K competing events.

    ``link="sigmoid"``: K cause-specific hazards, each its own probability. The loss is the sum over
    the causes of :func:`discrete_time_survival_nll`, in which an event of any other cause is
    censoring:

    .. math:: \sum_k \Big[ -\sum_{entry \le t < T} \log(1 - h_{tk}) - [type = k] \log h_{Tk}
              - [type \ne k]\, c \log(1 - h_{Tk}) \Big]

    ``link="softmax"`` (with ``from_logits=True``): K + 1 logits per visit, class 0 for no event, so
    that the hazards of a visit sum to less than 1:

    .. math:: -\sum_{entry \le t < T} \log p_{t0} - [type > 0] \log p_{T,type}
              - [type = 0]\, c \log p_{T0}

    Source: Tutz and Schmid, Modeling Discrete Time-to-Event Data (2016), chapter 8.

    Args:
        hazards: ``[B, V, K]`` probabilities or logits, or ``[B, V, K + 1]`` logits for softmax; or
            :class:`~ehrseq_fast.PackedRows` of them.
        event_times: ``[B]`` integer: the visit of event or censoring, counted from 0.
        event_types: ``[B]`` integer: 0 censored, 1..K the cause of the event.
        link: ``"sigmoid"``, ``"softmax"``, or ``"cloglog"``: as sigmoid, with
            h = 1 - exp(-e^x).

    All else, the dtypes, what is returned and what is refused are as for
    :func:`discrete_time_survival_nll`. Event types outside 0..K, and ``link="softmax"`` without
    ``from_logits=True``, are a ``ValueError``.

    Example:
        >>> import torch
        >>> from ehrseq_fast.survival_nll import competing_risks_nll
        >>> hazards = torch.tensor([[[0.1, 0.2], [0.5, 0.3]]])
        >>> competing_risks_nll(hazards, torch.tensor([1]), torch.tensor([1]))
        tensor(1.0217)
    """
    times: Any
    hazards, times = with_batch(hazards, event_times, "hazards")
    if isinstance(hazards, PackedRows):
        if sequence_mask is not None:
            refuse_mask(sequence_mask)
        return packed_competing_risks_nll(
            hazards,
            event_times=times,
            event_types=event_types,
            from_logits=from_logits,
            link=link,
            censored_visit=censored_visit,
            entry_times=entry_times,
            sample_weight=sample_weight,
            visit_weight=visit_weight,
            eps=eps,
            reduction=reduction,
            validate=validate,
        )
    options = SurvivalNll(link if from_logits else "probabilities", censored_visit, eps, reduction)
    inputs: Any = (hazards, times, event_types, sequence_mask, entry_times, sample_weight)
    if fits_link(link, from_logits, "softmax"):
        value = survival_on_host("survival_nll", 3, options, PADDED, inputs, visit_weight)
        if value is not None:
            return value
    times, event_types = require_outcomes(event_times=times, event_types=event_types)
    check_tensors(
        hazards,
        ("B", "V", "K" if link != "softmax" else "K + 1"),
        times,
        ("event_types", event_types, INTEGER | {torch.bool}),
        sequence_mask,
        entry_times,
        sample_weight,
    )
    check_link(hazards, link, from_logits)
    return _nll(inputs, options, visit_weight, validate)


def _nll(
    inputs: Inputs,
    options: SurvivalNll,
    visit_weight: Tensor | PackedRows | None,
    validate: bool,
) -> Tensor:
    """Either loss: [B, V] hazards are one risk, [B, V, K] competing ones."""
    hazards = inputs[0]
    device = hazards.device.type
    options.check()
    if visit_weight is not None:
        return weighted_nll(PADDED, inputs, options, visit_weight, validate)
    chosen = backend.choose("survival_nll", device, hazards.dtype)
    if transformed(hazards, inputs[5]):
        chosen = "reference"
    if chosen != "cpu" and must_check_values(chosen, device, validate):
        check_outcomes(inputs, options.link)
        check_probabilities(inputs, options)
    return nll(chosen, PADDED, inputs, options)
