"""The survival losses as operations: fake kernels, gradient, and the choice of backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import backend
from ..backend import must_check_values, operators
from ..schemas import fake
from . import reference
from .checks import INTEGER, REAL, check_tensors, check_values

if TYPE_CHECKING:
    from ..batch import PackedVisits

backend.register("survival_nll", "cpu", "cuda", "triton")

# As the operators number them (schemas.py).
LINKS = {"probabilities": 0, "sigmoid": 1, "softmax": 2}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
CENSORED_VISITS = ("excluded", "included")


def discrete_time_survival_nll(
    hazards: Tensor,
    event_times: Tensor,
    event_indicators: Tensor,
    sequence_mask: Tensor | None = None,
    *,
    from_logits: bool = False,
    censored_visit: str = "excluded",
    entry_times: Tensor | None = None,
    sample_weight: Tensor | None = None,
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
        hazards: ``[B, V]`` float32, float64, bfloat16 or float16: probabilities, clamped to
            ``[eps, 1 - eps]``, or logits with ``from_logits=True`` (never clamped).
        event_times: ``[B]`` integer: the visit of event or censoring, counted from 0.
        event_indicators: ``[B]`` bool or number: 1 event seen, 0 censored.
        sequence_mask: ``[B, V]`` bool or number: 1 on a patient's visits, 0 on the padding after
            them. Without it every slot is a visit, so padding must not be there, or must lie after
            the event time.
        entry_times: ``[B]`` integer: the first visit at risk (left truncation); 0 without it.
        sample_weight: ``[B]``: multiplies each patient's loss. No gradient flows to it.
        reduction: ``"mean"`` over the patients (always divided by B, whatever the weights; nan for
            B = 0, as ``torch.mean``), ``"sum"``, or ``"none"`` for ``[B]``.
        validate: check values on a GPU too, at the price of a synchronisation.

    Returns:
        The loss, float64 for float64 and float32 otherwise: a sum over many visits would overflow
        16 bits. The gradient has the dtype of ``hazards``; it is 0 where a hazard was clamped and
        at every visit that is not at risk, even if a NaN stands there.

    Raises:
        ValueError: for shapes or devices that do not fit, unknown options, masks with holes or
            values other than 0 and 1, patients without visits, event times outside a patient's
            visits, entry times after them, indicators other than 0 and 1.
        TypeError: for dtypes, event times in floating point among them.

    Example:
        >>> import torch
        >>> from ehrseq_fast.survival_nll import discrete_time_survival_nll
        >>> hazards = torch.tensor([[0.1, 0.2, 0.5], [0.1, 0.3, 0.9]])
        >>> times, seen = torch.tensor([2, 1]), torch.tensor([1, 0])
        >>> mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> discrete_time_survival_nll(hazards, times, seen, mask, reduction="none")
        tensor([1.0217, 0.1054])
    """
    check_tensors(
        hazards,
        ("B", "V"),
        event_times,
        ("event_indicators", event_indicators, REAL),
        sequence_mask,
        entry_times,
        sample_weight,
    )
    link = "sigmoid" if from_logits else "probabilities"
    return _nll(
        (hazards, event_times, event_indicators, sequence_mask, entry_times, sample_weight),
        (link, censored_visit, eps, reduction),
        validate,
    )


def competing_risks_nll(
    hazards: Tensor,
    event_times: Tensor,
    event_types: Tensor,
    sequence_mask: Tensor | None = None,
    *,
    from_logits: bool = False,
    link: str = "sigmoid",
    censored_visit: str = "excluded",
    entry_times: Tensor | None = None,
    sample_weight: Tensor | None = None,
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
        hazards: ``[B, V, K]`` probabilities or logits, or ``[B, V, K + 1]`` logits for softmax.
        event_times: ``[B]`` integer: the visit of event or censoring, counted from 0.
        event_types: ``[B]`` integer: 0 censored, 1..K the cause of the event.
        link: ``"sigmoid"`` or ``"softmax"``.

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
    check_tensors(
        hazards,
        ("B", "V", "K" if link != "softmax" else "K + 1"),
        event_times,
        ("event_types", event_types, INTEGER | {torch.bool}),
        sequence_mask,
        entry_times,
        sample_weight,
    )
    check_link(hazards, link, from_logits)
    return _nll(
        (hazards, event_times, event_types, sequence_mask, entry_times, sample_weight),
        (link if from_logits else "probabilities", censored_visit, eps, reduction),
        validate,
    )


def check_link(hazards: Tensor, link: str, from_logits: bool) -> None:
    """Refuse an unknown link, and hazards whose last dimension does not fit it."""
    if link not in ("sigmoid", "softmax"):
        raise ValueError(f"link must be 'sigmoid' or 'softmax', got {link!r}")
    if link == "softmax" and not from_logits:
        raise ValueError("link='softmax' takes logits: pass from_logits=True")
    fewest = 2 if link == "softmax" else 1
    if hazards.shape[-1] < fewest:
        raise ValueError(
            f"hazards must have at least {fewest} values per visit with link={link!r}, "
            f"got shape {list(hazards.shape)}"
        )


# hazards, event_times, event_types, sequence_mask, entry_times, sample_weight
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
# link, censored_visit, eps, reduction
Options = tuple[str, str, float, str]


def _nll(inputs: Inputs, options: Options, validate: bool) -> Tensor:
    """Either loss: [B, V] hazards are one risk, [B, V, K] competing ones."""
    hazards = inputs[0]
    check_options(options)
    chosen = backend.choose("survival_nll", hazards.device.type, hazards.dtype)
    if must_check_values(chosen, hazards.device.type, validate):
        check_outcomes(inputs, options)
    if chosen == "reference":
        return reference_nll(inputs, options)
    if hazards.requires_grad and torch.is_grad_enabled():
        return _FusedNll.apply(chosen, *inputs, *options)
    return _fused(chosen, inputs, options, needs_grad=False)[0]


def check_options(options: Options) -> None:
    """Refuse options that there are not."""
    _, censored_visit, eps, reduction = options
    if censored_visit not in CENSORED_VISITS:
        raise ValueError(f"censored_visit must be one of {CENSORED_VISITS}, got {censored_visit!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {tuple(REDUCTIONS)}, got {reduction!r}")
    if not 0 <= eps < 0.5:
        raise ValueError(f"eps must lie in [0, 0.5), got {eps}")


def check_outcomes(inputs: Inputs, options: Options) -> None:
    """Refuse impossible patients; reads values."""
    hazards, event_times, event_types, sequence_mask, entry_times, _ = inputs
    competing = hazards.dim() == 3
    check_values(
        hazards.shape[1],
        hazards.shape[2] - (options[0] == "softmax") if competing else 1,
        event_times,
        "event_types" if competing else "event_indicators",
        event_types,
        sequence_mask,
        entry_times,
    )


def reference_nll(inputs: Inputs, options: Options) -> Tensor:
    """The definition, of padded hazards."""
    hazards, event_times, event_types, sequence_mask, entry_times, sample_weight = inputs
    link, censored_visit, eps, reduction = options
    common: dict[str, Any] = {
        "from_logits": link != "probabilities",
        "censored_visit": censored_visit,
        "entry_times": entry_times,
        "sample_weight": sample_weight,
        "eps": eps,
        "reduction": reduction,
    }
    if hazards.dim() == 3:
        return reference.competing_risks_nll(
            hazards,
            event_times,
            event_types,
            sequence_mask,
            link="softmax" if link == "softmax" else "sigmoid",
            **common,
        )
    return reference.discrete_time_survival_nll(
        hazards, event_times, event_types, sequence_mask, **common
    )


def _fused(
    chosen: str, inputs: Inputs, options: Options, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    ops = operators(chosen)
    operator = ops.competing_risks_nll if inputs[0].dim() == 3 else ops.survival_nll
    link, censored_visit, eps, reduction = options
    return operator.default(
        *inputs,
        LINKS[link],
        censored_visit == "included",
        eps,
        REDUCTIONS[reduction],
        needs_grad,
    )


class _FusedNll(torch.autograd.Function):
    """The kernel writes the gradient along with the loss, so that backward has only to scale it."""

    @staticmethod
    def forward(ctx: Any, chosen: str, *args: Any) -> Tensor:
        inputs, options = args[:6], args[6:]
        nll, grad = _fused(chosen, inputs, options, needs_grad=True)
        ctx.save_for_backward(grad, inputs[0])
        ctx.chosen, ctx.outcomes, ctx.options = chosen, inputs[1:], options
        return nll

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        grad, hazards = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: a gradient that has a gradient itself
            nll = reference_nll((hazards, *ctx.outcomes), ctx.options)
            (grad,) = torch.autograd.grad(nll, hazards, grad_nll, create_graph=True)
        else:
            grad = scaled_gradient(ctx.chosen, grad, grad_nll, hazards)
        return None, grad, *(None,) * 9


def scaled_gradient(
    chosen: str, grad: Tensor, grad_nll: Tensor, hazards: Tensor, batch: PackedVisits | None = None
) -> Tensor:
    """The saved gradient times that of the loss: a number, or one per patient. Rows of ``hazards``
    are the patients or, with a ``batch``, its visits."""
    if chosen != "cpu":
        rows = (None,) * 3 if batch is None else packed_rows(batch)
        ops = operators(chosen)
        return ops.survival_nll_scale.default(grad, grad_nll, *rows, hazards.dtype)
    if _is_one(grad_nll) and grad.dtype == hazards.dtype:
        return grad
    if grad_nll.dim():
        per_row = grad_nll if batch is None else grad_nll[batch.patient_of_row]
        grad_nll = per_row.reshape(-1, *(1,) * (hazards.dim() - 1))
    return (grad * grad_nll).to(hazards.dtype)


def packed_rows(batch: PackedVisits) -> tuple[Tensor, Tensor, Tensor]:
    """How the operators find the rows of a patient in a packed batch (schemas.py)."""
    return batch.row_starts, batch.unsorted_indices, batch.last_rows


def _is_one(grad_nll: Tensor) -> bool:
    """Whether a host scalar is 1, as it is where the loss is what backward was called on."""
    return (
        type(grad_nll) is Tensor
        and grad_nll.dim() == 0
        and grad_nll.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and grad_nll.item() == 1
    )


@fake("survival_nll", "competing_risks_nll")
def _(
    hazards: Tensor,
    event_times: Tensor,
    event_types: Tensor,
    sequence_mask: Tensor | None,
    entry_times: Tensor | None,
    sample_weight: Tensor | None,
    link: int,
    censored_included: bool,
    eps: float,
    reduction: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    return empty_nll_and_grad(hazards, hazards.shape[:1], reduction, needs_grad)


def empty_nll_and_grad(
    hazards: Tensor, patients: tuple[int, ...], reduction: int, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of loss and saved gradient (float32 for float16: see ``csrc``)."""
    wide = torch.float64 if hazards.dtype == torch.float64 else torch.float32
    saved = torch.float32 if hazards.dtype == torch.float16 else hazards.dtype
    nll = hazards.new_empty(patients if reduction == REDUCTIONS["none"] else (), dtype=wide)
    return nll, hazards.new_empty(hazards.shape if needs_grad else (0,), dtype=saved)


@fake("survival_nll_scale")
def _(
    grad: Tensor,
    grad_nll: Tensor,
    row_starts: Tensor | None,
    unsorted_indices: Tensor | None,
    last_rows: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)


backend.load_triton_kernels(__package__)
