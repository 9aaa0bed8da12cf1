"""The loss of a visit's codes: arguments checked, targets found, backend chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from ..arrays import expect_tensor, integer
from ..autograd import transformed, values_are_hidden
from ..backend import must_check_values
from ..checks import REAL, accumulator, expect_device, expect_floating, expect_option
from ..rows import PackedRows
from ..rows.beside import values_beside
from . import operators  # noqa: F401  (which defines what is called here)
from .fused import Inputs, losses
from .sampling import draw, sampled_losses
from .targets import Ragged, Targets, find

REDUCTIONS = ("none", "mean", "sum")


def next_codes_bce(
    states: Tensor | PackedRows,
    weight: Tensor,
    bias: Tensor | None = None,
    targets: Ragged | None = None,
    sequence_mask: Tensor | None = None,
    *,
    next_visit: bool | None = None,
    pos_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    visit_weight: Tensor | None = None,
    n_negatives: int | None = None,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    r"""Binary cross-entropy of which codes a visit has, over a whole vocabulary: by default of
    the patient's next visit, from the state after this one.

    Per visit with state :math:`s` and the set of codes :math:`C`, with logits :math:`z = W s + b`:

    .. math:: \sum_{k \in C} w_k p_k \, \mathrm{softplus}(-z_k)
              + \sum_{k \notin C} w_k \, \mathrm{softplus}(z_k)

    with ``class_weight`` w and ``pos_weight`` p, as in ``F.binary_cross_entropy_with_logits`` with
    a target of 1 at each code; a code that a visit has twice counts once. It is the sum over the K
    classes: PyTorch's mean over visits and classes is this mean divided by K.

    The targets stay ragged and the logits are computed some rows at a time, with the gradients of
    states, weight and bias while they are there: neither logits nor targets nor their gradients are
    ever ``[n_visits, K]``.

    ``n_negatives`` = m estimates the second sum from m classes that are drawn without replacement,
    all equally likely, for all visits of the call together: times K / m what those of them
    contribute that are not the visit's. Its expectation, and that of its gradient, is the exact
    one's; for m = K it is exact. The first sum is always exact, and takes memory for a state and a
    row of ``weight`` per code.

    Args:
        states: ``[n_visits, H]`` float32, float64, bfloat16 or float16, as
            :class:`~ehrseq_fast.PackedRows` or a tensor; or padded ``[B, V, H]``.
        weight: ``[K, H]``, as ``nn.Linear.weight``. float64 where states are; otherwise any, also
            another than that of states.
        bias: ``[K]``, or None.
        targets: a :class:`~ehrseq_fast.PackedVisits` of the same visits as the states; or a pair of
            codes ``[n_codes]`` and offsets ``[n + 1]``, int32 or int64, for the n real visits in
            the order of the states: visit i has ``codes[offsets[i]:offsets[i + 1]]``. None with
            PackedRows: their batch. A code is there or is not: a batch's ``code_weights`` are not
            read.
        sequence_mask: ``[B, V]`` bool or number: 1 on the visits of padded states, which alone are
            read. Not needed with a PackedVisits; without either every slot is a visit.
        next_visit: whether the targets of a visit are the codes of the patient's next visit and not
            its own. A patient's last visit then has none and does not count. By default where
            ``targets`` is None.
        pos_weight, class_weight: ``[K]``, at least 0.
        visit_weight: a factor for each visit's loss, at least 0: ``[n_visits]``, or ``[B, V]`` with
            padded states.
        n_negatives: how many classes to draw, 1..K; all are computed without it.
        generator: what they are drawn with.
        reduction: ``"mean"`` over the visits that count, whatever their weights (nan where there
            are none), ``"sum"``, or ``"none"``: one loss per visit in the layout of the states, 0
            where a visit does not count.
        validate: check values on a GPU too, at the price of a synchronisation.

    Returns:
        The loss, float64 for float64 and float32 otherwise, also under autocast. Sums on the CPU's
        kernels have the same bits for any number of threads; on other backends the products are
        those of ``torch.mm``, which promises that for a fixed number of threads alone. Second
        derivatives, forward mode and the transforms of ``torch.func`` are computed by the plain
        PyTorch definition, which is dense; the sampled loss has no second derivative.

    Raises:
        ValueError: for shapes or devices that do not fit, targets of other visits, negative
            weights, weights that require a gradient, unknown options.
        IndexError: for a code outside the vocabulary, naming its visit.
        TypeError: for dtypes, and targets of another kind.

    Example:
        >>> import torch
        >>> from ehrseq_fast import PackedRows, PackedVisits, next_codes_bce
        >>> batch = PackedVisits.from_lists([[[1], [0, 2]], [[2]]])
        >>> head = torch.nn.Linear(4, 3)
        >>> _ = torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
        >>> states = PackedRows(torch.ones(3, 4), batch)
        >>> next_codes_bce(states, head.weight, head.bias)  # 3 log 2: one visit has a next one
        tensor(2.0794, grad_fn=<DivBackward0>)
        >>> next_codes_bce(states, head.weight, head.bias, next_visit=False, reduction="none")
        tensor([2.0794, 2.0794, 2.0794], grad_fn=<ViewBackward0>)
    """
    expect_option("reduction", reduction, REDUCTIONS)
    visit_weight = values_beside(states, visit_weight, "visit_weight")
    values = states.values if isinstance(states, PackedRows) else states
    _check_layers(values, weight, bias, isinstance(states, PackedRows))
    hidden = values_are_hidden(values, weight, visit_weight)
    reads = must_check_values("reference", values.device.type, validate) and not hidden
    values, visits = find(states, targets, sequence_mask, next_visit, reads)
    classes = len(weight)
    _check_weights(values, weight, classes, pos_weight, class_weight, reads)
    if reads:
        visits.refuse_codes_outside(classes)
    if visit_weight is not None:
        _check_visit_weight(values, visits, visit_weight, reduction, reads)
        visit_weight = visits.take(visit_weight).to(accumulator(values.dtype))
    chosen = backend.choose("next_codes", values.device.type, values.dtype)
    inputs = Inputs(
        visits.take(values),
        weight,
        bias,
        visits.codes,
        visits.code_offsets,
        pos_weight,
        class_weight,
        None if reduction == "none" else visit_weight,
    )
    if n_negatives is None and reduction != "none":
        total = losses(chosen, inputs, total=True)
        return total / visits.n_visits if reduction == "mean" else total
    if n_negatives is None:
        by_visit = losses(chosen, inputs, total=False)
    else:
        count = integer("n_negatives", n_negatives, 1, classes)
        columns = draw(classes, count, values.device, generator)
        by_visit = sampled_losses(chosen, inputs, columns)
    if visit_weight is not None:
        by_visit = by_visit * visit_weight
    if reduction == "none":
        return visits.spread(by_visit)
    return by_visit.sum() / visits.n_visits if reduction == "mean" else by_visit.sum()


def _check_layers(values: Tensor, weight: Tensor, bias: Tensor | None, is_packed: bool) -> None:
    expect_floating("states", values)
    expect_floating("weight", weight)
    if values.dim() != 2 and (is_packed or values.dim() != 3):
        expected = "[n_visits, H]" if is_packed else "[n_visits, H] or [B, V, H]"
        raise ValueError(f"states: expected {expected}, got {list(values.shape)}")
    if weight.dim() != 2 or weight.shape[1] != values.shape[-1]:
        raise ValueError(
            f"weight: expected [K, H={values.shape[-1]}] for states {list(values.shape)}, got "
            f"{list(weight.shape)}"
        )
    others: tuple[tuple[str, Tensor | None], ...] = (("weight", weight), ("bias", bias))
    for name, tensor in others:
        if tensor is None:
            continue
        expect_floating(name, tensor)
        if (tensor.dtype == torch.float64) != (values.dtype == torch.float64):
            raise TypeError(
                f"{name}: expected float64 where states are, and only there, got {tensor.dtype} "
                f"and states in {values.dtype}"
            )
        expect_device(name, tensor, values.device, "states")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [K={len(weight)}], got {list(bias.shape)}")


def _check_weights(
    values: Tensor,
    weight: Tensor,
    classes: int,
    pos_weight: Tensor | None,
    class_weight: Tensor | None,
    reads: bool,
) -> None:
    for name, tensor in (("pos_weight", pos_weight), ("class_weight", class_weight)):
        if tensor is None:
            continue
        expect_floating(name, tensor)
        if tensor.shape != (classes,):
            raise ValueError(f"{name}: expected [K={classes}], got {list(tensor.shape)}")
        expect_device(name, tensor, values.device, "states")
        _refuse_gradient(name, tensor, values, weight)
        if reads and bool((wrong := tensor < 0).any()):
            code = int(wrong.to(torch.int8).argmax())
            raise ValueError(
                f"{name}: expected at least 0, got {float(tensor[code]):g} (code {code})"
            )


def _check_visit_weight(
    values: Tensor, visits: Targets, visit_weight: Tensor, reduction: str, reads: bool
) -> None:
    expect_tensor("visit_weight", visit_weight)
    if visit_weight.dtype not in REAL:
        raise TypeError(f"visit_weight: expected a real dtype, got {visit_weight.dtype}")
    if visit_weight.shape != visits.shape:
        raise ValueError(
            f"visit_weight: expected one per visit, {list(visits.shape)}, got "
            f"{list(visit_weight.shape)}"
        )
    expect_device("visit_weight", visit_weight, values.device, "states")
    if reduction != "none":
        _refuse_gradient("visit_weight", visit_weight, values)
    if not reads:
        return
    counted = visits.take(visit_weight)  # padding may hold anything
    if bool((wrong := counted < 0).any()):
        at = int(wrong.to(torch.int8).argmax())
        place = at if visits.rows is None else int(visits.rows[at])
        visit = torch.unravel_index(torch.tensor(place, device="cpu"), visits.shape)
        raise ValueError(
            f"visit_weight: expected at least 0, got {float(counted[at]):g} at "
            f"{[int(number) for number in visit]}"
        )


def _refuse_gradient(name: str, tensor: Tensor, *others: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled() and not transformed(tensor, *others):
        raise ValueError(
            f"{name}: expected no requires_grad, as the loss has a gradient for states, weight and "
            "bias alone; detach it"
        )
