"""Cross-entropy of one class per visit: arguments checked, backend chosen, gradient attached."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .. import backend
from ..autograd import transformed
from ..backend import must_check_values
from ..checks import INTEGER, REAL, expect_option
from ..rows import PackedRows
from ..rows.beside import values_beside
from ..survival_nll.checks import check_companion, check_hazards, vmapped
from ..survival_nll.fused import PADDED, nll, nll_on_host
from ..survival_nll.operators import REDUCTIONS
from ..visitwise import (
    Visits,
    check_companions,
    check_of_visits,
    check_visits,
    check_weights,
    layout_of,
    refuse_learned,
    refuse_visits,
)
from . import (
    operators,  # noqa: F401  (which defines what is called here)
    reference,
)


class CrossEntropy(NamedTuple):
    """The options of the loss, and what computes it (:class:`~..survival_nll.fused.Loss`)."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"

    def check(self) -> None:
        """``ValueError`` for unknown options."""
        expect_option("reduction", self.reduction, REDUCTIONS)
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(
                f"label_smoothing: expected a number in [0, 1], got {self.label_smoothing}"
            )

    def define(self, inputs: Any) -> Tensor:
        logits, labels, *visits, class_weight, visit_weight, sample_weight = inputs
        return reference.visit_cross_entropy(
            logits,
            labels,
            Visits(*visits),
            class_weight=class_weight,
            visit_weight=visit_weight,
            sample_weight=sample_weight,
            **self._asdict(),
        )

    def compute(self, ops: Any, rows: Any, inputs: Any, needs_grad: bool) -> Any:
        numbered = (self.ignore_index, float(self.label_smoothing), REDUCTIONS[self.reduction])
        return ops.visit_cross_entropy.default(*inputs, *numbered, needs_grad)


def visit_cross_entropy(
    logits: Tensor | PackedRows,
    labels: Tensor | PackedRows,
    sequence_mask: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    visit_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    r"""Cross-entropy of one class per visit, over the real visits that have a label.

    With logits :math:`x_n` of visit :math:`n`, its label :math:`y_n`, weights :math:`c` of the
    classes and :math:`w_n` of the visits (``visit_weight`` times the patient's ``sample_weight``):

    .. math:: \frac{\sum_n w_n c_{y_n} \big(-\log \mathrm{softmax}(x_n)_{y_n}\big)}
              {\sum_n w_n c_{y_n}}

    as ``torch.nn.functional.cross_entropy`` of the real visits' rows, label smoothing included
    (Szegedy et al., Rethinking the Inception architecture, CVPR 2016). Loss and gradient are
    computed in one pass, without the log-probabilities in memory.

    Args:
        logits: ``[B, V, K]`` float32, float64, bfloat16 or float16. Or
            :class:`~ehrseq_fast.PackedRows` ``[n_visits, K]``.
        labels: ``[B, V]`` integer, in [0, K); of packed rows ``[n_visits]`` in their order, such as
            ``batch.visit_targets["..."]``, or PackedRows. What padding holds is never read.
        sequence_mask: ``[B, V]`` bool or number: 1 on a patient's visits, 0 on the padding after
            them. Without it every slot is a visit. A patient may have none.
        class_weight: ``[K]``, at least 0.
        visit_weight: ``[B, V]`` or ``[n_visits]``, at least 0 at visits.
        sample_weight: ``[B]``, at least 0: multiplies the weights of a patient's visits. No
            gradient flows to any of the weights: one that requires a gradient is refused. A NaN or
            an infinity in a weight shows in loss and gradient, as everything of a visit that
            counts; of visits that do not, weights are not read either.
        ignore_index: the label of visits that are left out, whose logits are not read.
        label_smoothing: ε in [0, 1]: the label's term counts 1 - ε, and the mean of the terms of
            all classes, each times its weight, ε.
        reduction: ``"mean"``: divided by the weights of the visits that count, as above (nan where
            there is none, as in PyTorch); ``"sum"``; or ``"none"``: ``[B, V]`` or ``[n_visits]``,
            0 where nothing counts.
        validate: check values on a GPU too, at the price of a synchronisation. Unchecked, a label
            outside [0, K) makes the loss NaN.

    Returns:
        The loss, float64 for float64 and float32 otherwise. The gradient has the dtype of
        ``logits`` and is 0 where nothing counts. Second derivatives, forward mode and the
        transforms of ``torch.func`` are computed by the plain PyTorch definition.

    Raises:
        ValueError: for shapes or devices that do not fit, unknown options, masks with holes, labels
            outside [0, K) at a visit, negative weights.
        TypeError: for dtypes.

    Example:
        >>> import torch
        >>> from ehrseq_fast import visit_cross_entropy
        >>> logits = torch.zeros(2, 3, 4)
        >>> labels = torch.tensor([[0, 3, 1], [2, -100, 99]])
        >>> visit_cross_entropy(logits, labels, torch.tensor([[1, 1, 1], [1, 1, 0]]))
        tensor(1.3863)
    """
    classes_of: Any = values_beside(logits, labels, "labels")
    visit_weight = values_beside(logits, visit_weight, "visit_weight")
    logits, visits, patients = layout_of(logits, sequence_mask)
    loss = CrossEntropy(ignore_index, label_smoothing, reduction)
    weights = (class_weight, visit_weight, sample_weight)
    inputs: Any = (logits, classes_of, *visits, *weights)
    dims = 2 if visits.packed else 3
    value = nll_on_host("visit_cross_entropy", dims, loss, PADDED, inputs, weights)
    if value is not None:
        return value
    check_hazards(logits, ("n_visits", "K") if visits.packed else ("B", "V", "K"), "logits")
    check_of_visits(logits, visits, "labels", classes_of, INTEGER, "an integer")
    patients = logits.shape[0] if patients is None else patients
    check_companions(logits, visits, patients, visit_weight, sample_weight)
    classes = logits.shape[-1]
    if classes < 1:
        raise ValueError(f"logits: expected at least one class, got shape {list(logits.shape)}")
    if class_weight is not None:
        kind = (REAL, "a bool or numeric")
        shape = (classes,)
        check_companion(logits, "logits", shape, "class_weight", class_weight, *kind, ("K",))
        refuse_learned(logits, class_weight=class_weight)
    loss.check()
    device = logits.device.type
    chosen = backend.choose("visit_cross_entropy", device, logits.dtype)
    if transformed(logits, class_weight, visit_weight, sample_weight):
        chosen = "reference"
    if must_check_values(chosen, device, validate) and not vmapped():
        _check_values(visits, classes_of, classes, ignore_index, class_weight)
        check_weights(visits, visit_weight, sample_weight)
    return nll(chosen, PADDED, inputs, loss)


def _check_values(
    visits: Visits, labels: Tensor, classes: int, ignore_index: int, class_weight: Tensor | None
) -> None:
    if class_weight is not None:
        negative = (class_weight < 0).nonzero()
        if len(negative):
            at = int(negative[0])
            raise ValueError(
                "class_weight: expected weights of at least 0, "
                f"got {float(class_weight[at]):g} for class {at}"
            )
    check_visits(visits)
    labels = labels.long()  # uint8 would be compared with -100 as with 156
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
    rule = f"labels must be a class 0..{classes - 1} or {ignore_index} (ignored)"
    refuse_visits(visits, wrong, labels, rule)
