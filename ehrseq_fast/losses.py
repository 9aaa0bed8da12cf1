"""Losses on padded, visit-level predictions. The survival likelihoods are in ``survival_nll``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .arrays import expect_tensor, kind_of, whole
from .autograd import outside_transforms, transformed, unwrapped, values_are_hidden
from .backend import choose, validate_on_device
from .batch import PackedVisits
from .checks import REAL, expect_device
from .fixed_horizon.checks import check_horizon
from .fixed_horizon.op import MaskedBCE, fixed_horizon_bce
from .fixed_horizon.reference import masked_bce
from .models.sequences import refuse_zero_lengths
from .rows import PackedRows
from .rows.beside import values_beside, with_batch
from .survival_nll.fused import PADDED, nll, nll_on_host


class FixedHorizonProgressionLoss(nn.Module):
    """Binary cross-entropy of "the event comes within the horizon", averaged over valid visits.

    ``loss = Σ m · BCE(σ(logits), labels) / max(Σ m, 1)`` with ``m`` = ``valid_mask``: the visits
    that are no padding and whose horizon was observed (not censored). What other visits hold,
    a label of −1 or a NaN logit, matters neither forward nor backward; without a mask it would, so
    the mask is required. Computed in float32 for 16-bit logits, and returned in their dtype.

    Labels may be given, or be made from event times:
    ``loss(logits, event_times=..., event_indicators=..., sequence_mask=...)`` is
    :func:`~ehrseq_fast.fixed_horizon_bce`, whose :func:`~ehrseq_fast.fixed_horizon_labels` says
    which visits are valid.

    Args:
        horizon_days: the horizon in days (of ``visit_times``). Where labels are given it is there
            for the record: they already hold it.
        horizon_visits: the horizon in visits, in place of days.

    Raises:
        ValueError: for both horizons, or one that is not above 0.

    Example:
        >>> import torch
        >>> from ehrseq_fast.losses import FixedHorizonProgressionLoss
        >>> loss = FixedHorizonProgressionLoss(horizon_days=180)
        >>> logits = torch.tensor([[0.0, 0.0, float("nan")]])
        >>> loss(logits, torch.tensor([[1, 0, -1]]), torch.tensor([[1, 1, 0]]))
        tensor(0.6931)
        >>> loss(
        ...     logits,
        ...     event_times=torch.tensor([400.0]),
        ...     event_indicators=torch.tensor([1]),
        ...     visit_times=torch.tensor([[0.0, 300.0, 400.0]]),
        ... )
        tensor(0.6931)
    """

    def __init__(
        self, horizon_days: float | None = None, *, horizon_visits: float | None = None
    ) -> None:
        super().__init__()
        if horizon_days is not None and horizon_visits is not None:
            raise ValueError(
                "horizon_days and horizon_visits: expected one of them, got "
                f"{horizon_days} and {horizon_visits}"
            )
        for name, horizon in (("horizon_days", horizon_days), ("horizon_visits", horizon_visits)):
            if horizon is not None:
                check_horizon(horizon, name)
        self.horizon_days = horizon_days
        self.horizon_visits = horizon_visits

    def extra_repr(self) -> str:
        if self.horizon_visits is not None:
            return f"horizon_visits={self.horizon_visits}"
        return f"horizon_days={self.horizon_days}"

    def forward(
        self,
        logits: Tensor | PackedRows,
        labels: Tensor | PackedRows | PackedVisits | None = None,
        valid_mask: Tensor | PackedRows | None = None,
        *,
        event_times: Tensor | None = None,
        event_indicators: Tensor | None = None,
        sequence_mask: Tensor | None = None,
        visit_times: Tensor | None = None,
        visit_weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Scalar loss; 0 where no visit is valid.

        Args:
            logits: ``[B, V]`` floating; with labels any shape, the same for all three. Or
                :class:`~ehrseq_fast.PackedRows` ``[n_visits]``.
            labels: ``[B, V]`` bool or numeric, in [0, 1] at valid visits; beside packed rows such
                rows or ``[n_visits]``. Or in their place the batch of packed logits, with
                outcomes: ``loss(rows, batch)``.
            valid_mask: ``[B, V]`` bool or numeric; a fraction is a weight, a NaN or an infinity
                shows in the loss. Beside packed rows such rows or ``[n_visits]``, and without it
                all of their visits are valid.
            event_times, event_indicators, sequence_mask, visit_times, visit_weight, sample_weight:
                in place of labels, as for :func:`~ehrseq_fast.fixed_horizon_bce`. Of packed rows
                the outcomes may be left out: with ``horizon_visits`` they are
                ``batch.event_times`` and ``batch.event_indicators``, with ``horizon_days``
                ``batch.visit_targets["days_to_end"]``, the days from each visit to the event or
                the end of observation, and ``batch.event_indicators``.

        Raises:
            ValueError: for shapes or devices that differ, labels outside [0, 1] at valid visits,
                and a mask that is negative (on a GPU with ``EHRSEQ_FAST_VALIDATE=1``; under
                ``vmap`` those of all samples are looked at); labels and event times at once;
                without labels, a loss that was made without a horizon, and what
                :func:`~ehrseq_fast.fixed_horizon_bce` refuses.
            TypeError: for anything but tensors of real numbers and packed rows.
        """
        logits, labels = with_batch(logits, labels, "logits", "labels")
        of_outcomes = {
            "event_times": event_times,
            "event_indicators": event_indicators,
            "sequence_mask": sequence_mask,
            "visit_times": visit_times,
            "visit_weight": visit_weight,
            "sample_weight": sample_weight,
        }
        if labels is None and valid_mask is None:
            return self._from_outcomes(logits, of_outcomes)
        for name, given in of_outcomes.items():
            if given is not None:
                raise ValueError(f"{name}: expected None with labels, which hold it, got a value")
        return _loss_of_labels(logits, labels, valid_mask)

    def _from_outcomes(
        self, logits: Tensor | PackedRows, given: dict[str, Tensor | None]
    ) -> Tensor:
        horizon = self.horizon_days if self.horizon_visits is None else self.horizon_visits
        if horizon is None:
            raise ValueError(
                "horizon_days or horizon_visits: expected with FixedHorizonProgressionLoss where "
                "no labels are given, got None"
            )
        if self.horizon_visits is not None:
            if given["visit_times"] is not None:
                raise ValueError("visit_times: expected None with horizon_visits, got a tensor")
        elif given["visit_times"] is None:
            given.update(self._days_of(logits, given["event_times"]))
        loss = fixed_horizon_bce(logits, horizon=horizon, **given)  # type: ignore[arg-type]
        return loss.to(logits.dtype)

    @staticmethod
    def _days_of(logits: Tensor | PackedRows, event_times: Tensor | None) -> dict[str, Tensor]:
        """Times on an axis that has its 0 at the end of each patient's observation."""
        if isinstance(logits, PackedRows) and event_times is None:
            days = logits.batch.visit_targets.get("days_to_end")
            if days is not None:
                zeros = days.new_zeros(len(logits.batch))
                return {"event_times": zeros, "visit_times": 0 - days}
        raise ValueError(
            "visit_times: expected with horizon_days, the day of each visit, or packed rows "
            "whose batch has visit_targets['days_to_end'], got None"
        )


def _loss_of_labels(logits: Any, labels: Any, valid_mask: Any) -> Tensor:
    labels = values_beside(logits, labels, "labels")
    valid_mask = values_beside(logits, valid_mask, "valid_mask")
    if isinstance(logits, PackedRows):
        logits = logits.values
        if valid_mask is None:
            valid_mask = torch.ones_like(logits, dtype=torch.bool)
    if isinstance(logits, Tensor) and logits.numel():
        given = (logits, labels, valid_mask)
        value = nll_on_host("masked_bce", 2, MaskedBCE(), PADDED, given, given[1:])
        if value is not None:
            return value.to(logits.dtype)
    tensors: list[Tensor] = []
    for name, tensor in (("logits", logits), ("labels", labels), ("valid_mask", valid_mask)):
        expect_tensor(name, tensor)
        if tensor.is_complex():
            raise TypeError(f"{name}: expected real numbers, got {tensor.dtype}")
        tensors.append(tensor)
        if tensor.shape != tensors[0].shape:
            raise ValueError(
                f"{name}: expected the shape of logits, {list(tensors[0].shape)}, "
                f"got {list(tensor.shape)}"
            )
        expect_device(name, tensor, tensors[0].device, "logits")
    scores, targets, weights = tensors
    if not scores.is_floating_point():
        raise TypeError(f"logits: expected a floating dtype, got {scores.dtype}")
    chosen = "reference"
    if scores.numel() and all(tensor.dtype in REAL for tensor in tensors):
        chosen = choose("masked_bce", scores.device.type, scores.dtype)
    learned = (targets.requires_grad or weights.requires_grad) and torch.is_grad_enabled()
    if learned or transformed(*tensors):
        chosen = "reference"
    if chosen == "reference":
        _check_values(targets, weights)
        return masked_bce(*tensors).to(scores.dtype)
    row = scores.shape[-1] if scores.dim() > 1 else scores.numel()
    flat: Any = tuple(tensor.reshape(-1, row) for tensor in tensors)
    try:
        return nll(chosen, PADDED, flat, MaskedBCE()).to(scores.dtype)
    except ValueError:  # the kernel has seen that a value is wrong; this says which
        _check_values(targets, weights)
        raise


def _reads_values(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or validate_on_device()


def _check_values(labels: Tensor, valid_mask: Tensor) -> None:
    _check_weights(valid_mask)
    _check_targets(labels, valid_mask)


def _check_weights(valid_mask: Tensor) -> None:
    if valid_mask.dtype in (torch.bool, torch.uint8) or not _reads_values(valid_mask):
        return
    found = _first_wrong(valid_mask, lambda mask: mask < 0)
    if found:
        raise ValueError(
            f"valid_mask: expected numbers of at least 0, found {found[0]} others; the first is "
            f"{found[1]}"
        )


def _check_targets(labels: Tensor, valid_mask: Tensor) -> None:
    if not _reads_values(labels):
        return
    targets = labels.masked_fill(valid_mask == 0, 0)
    found = _first_wrong(targets, lambda values: ~((values >= 0) & (values <= 1)))
    if found:
        raise ValueError(
            f"Found {found[0]} labels outside [0, 1] at valid visits. The first is {found[1]}."
        )


def _first_wrong(values: Tensor, is_wrong: Callable[[Tensor], Tensor]) -> tuple[int, str] | None:
    """How many values are wrong, and the first with its place. Under ``vmap`` those of all samples
    are looked at, and the first is named without its place, as it has the samples' dimension."""
    mapped, plain = values_are_hidden(values), unwrapped(values)
    with outside_transforms():
        places = is_wrong(plain).nonzero()
        if not len(places):
            return None
        first = places[0].tolist()
        where = "" if mapped else f" at [patient, visit] = {first}"
        return len(places), f"{plain[tuple(first)].item():g}{where}"


_NUMBERS = (int, float, np.integer, np.floating, Tensor)


class MultiTaskSurvivalLoss(nn.Module):
    """Weighted sum of the losses of several tasks, ``Σ_k w_k · L_k``.

    With ``learned=True`` each task has a log-variance s, a parameter of this module to be given to
    the optimizer, and the sum is ``Σ_k exp(−s_k) · L_k + s_k / 2``: a task whose loss stays large
    counts less. For losses that are negative log-likelihoods (Kendall, Gal and Cipolla, Multi-task
    learning using uncertainty, CVPR 2018, equation 10).

    Args:
        task_weights: weight of each task, by name: numbers, or tensors where they are learnt
            elsewhere. Where they are learned here these are the first ones, numbers above 0.
        learned: whether this module learns them, as ``log_variances``, a parameter for each name:
            a ``state_dict`` holds them by their names, in whatever order they are given.

    Raises:
        TypeError: for weights that are no mapping, a weight that is no number, and names of weights
            to be learned that are no strings.
        ValueError: for weights to be learned that are not finite and above 0, and names that no
            parameter can have.

    Example:
        >>> import torch
        >>> from ehrseq_fast.losses import MultiTaskSurvivalLoss
        >>> loss = MultiTaskSurvivalLoss({"survival": 1.0, "readmission": 0.5})
        >>> loss({"survival": torch.tensor(2.0), "readmission": torch.tensor(4.0)})
        tensor(4.)
    """

    log_variances: nn.ParameterDict | None

    def __init__(
        self, task_weights: Mapping[str, float | Tensor], *, learned: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(task_weights, Mapping):
            raise TypeError(
                f"task_weights: expected a mapping of names to weights, got {kind_of(task_weights)}"
            )
        for name, weight in task_weights.items():
            if not isinstance(weight, _NUMBERS) or isinstance(weight, bool):
                raise TypeError(
                    f"task_weights[{name!r}]: expected a number, got {weight!r:.50} of type "
                    f"{type(weight).__name__}"
                )
        self.task_weights = dict(task_weights)
        self.log_variances = None
        if learned:
            for name, weight in task_weights.items():
                _expect_parameter_name(name)
                if not 0 < float(weight) < float("inf"):
                    raise ValueError(
                        f"task_weights[{name!r}]: expected a finite number above 0, as it is to "
                        f"be learned, got {float(weight):g}"
                    )
            first = {name: torch.tensor(float(weight)) for name, weight in task_weights.items()}
            self.log_variances = nn.ParameterDict({name: -w.log() for name, w in first.items()})

    def extra_repr(self) -> str:
        learned = "" if self.log_variances is None else ", learned=True"
        return f"task_weights={self.task_weights}{learned}"

    def forward(self, task_losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum. A task without a weight is left out, as in the reference; a task with a
        weight may be missing from a batch, to which it then adds nothing.

        Raises:
            ValueError: where no task has a weight, or the losses differ in shape.
            TypeError: for a loss that is no tensor.
        """
        if not isinstance(task_losses, Mapping):
            raise TypeError(
                f"task_losses: expected a mapping of names to losses, got {kind_of(task_losses)}"
            )
        for name, loss in task_losses.items():
            expect_tensor(f"task_losses[{name!r}]", loss, "a tensor, the loss of that task")
        weighted = [
            self._weighted(name, loss)
            for name, loss in task_losses.items()
            if name in self.task_weights
        ]
        if not weighted:
            raise ValueError(
                f"task_losses: expected a task with a weight, one of {sorted(self.task_weights)}, "
                f"got {sorted(task_losses)}"
            )
        if len(shapes := {tuple(loss.shape) for loss in weighted}) > 1:
            raise ValueError(
                f"task_losses: expected losses of one shape, got {sorted(map(list, shapes))}"
            )
        total = torch.stack(weighted).sum(0)
        if self.log_variances is not None:
            # a gradient of 0: DistributedDataParallel waits for one of every parameter
            for name, log_variance in self.log_variances.items():
                if name not in task_losses:
                    total = total + log_variance * 0
        return total

    def _weighted(self, name: str, loss: Tensor) -> Tensor:
        if self.log_variances is None:
            return self.task_weights[name] * loss
        log_variance = self.log_variances[name]
        return (-log_variance).exp() * loss + log_variance / 2


def _expect_parameter_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"task_weights: expected names that are strings, got {name!r:.50}")
    if not name or "." in name or hasattr(nn.ParameterDict, name):
        raise ValueError(
            f"task_weights: expected names that a parameter can have (not empty, without dots, no "
            f"attribute of ParameterDict), got {name!r:.50}"
        )


def compute_masked_loss(
    criterion: Callable[[Tensor, Tensor], Tensor],
    predictions: Tensor | PackedRows,
    labels: Tensor | PackedRows,
    lengths: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """A PyTorch criterion on the real visits alone, averaged over them.

    The real visits' rows are taken out first and the criterion sees nothing else, so a NaN or an
    invalid label on padding matters neither forward nor backward. (Multiplying an unreduced loss by
    a mask lets NaN through, and a criterion that averages would count padding.)

    ``lengths`` is the mask here: the third level after codes and visits in the model. They build an
    index on the host; lengths on a GPU cost one synchronisation, a list or a CPU tensor
    costs none.

    Args:
        criterion: ``criterion(predictions, labels)`` on rows, such as ``nn.BCEWithLogitsLoss()`` or
            ``nn.CrossEntropyLoss()``. An unreduced result (``reduction="none"``) is averaged.
        predictions: ``[B, T]`` or ``[B, T, K]``, padded; or :class:`~ehrseq_fast.PackedRows`
            ``[n_visits]`` or ``[n_visits, K]``, which are real visits alone.
        labels: of the shape of ``predictions`` (BCE, MSE; or class probabilities), or, for
            ``[B, T, K]``, integer class indices ``[B, T]``. Bool and integer labels of the shape of
            ``predictions`` are converted to their dtype.
            Beside packed rows such rows, or a tensor with one row per visit.
        lengths: ``[B]``, real visits of each patient, from 1 to T; None beside packed rows.

    Raises:
        RuntimeError: where ``vmap`` runs over ``lengths`` (it may run over the other two).
        ValueError: for shapes other than these three, and lengths outside [1, T].
        TypeError: for class indices that are not integers, lengths beside packed rows, and none
            beside padded tensors.

    Example:
        >>> import torch
        >>> from ehrseq_fast.losses import compute_masked_loss
        >>> scores = torch.tensor([[0.0, 0.0], [0.0, float("nan")]])
        >>> compute_masked_loss(torch.nn.BCEWithLogitsLoss(), scores, torch.ones(2, 2), [2, 1])
        tensor(0.6931)
    """
    wanted: Any = values_beside(predictions, labels, "labels")
    packed = isinstance(predictions, PackedRows)
    if packed != (lengths is None):
        raise TypeError(
            "lengths: expected None beside PackedRows, whose batch has them"
            if packed
            else "lengths: expected one per patient beside padded predictions, got None"
        )
    found = predictions.values if isinstance(predictions, PackedRows) else predictions
    expect_tensor("predictions", found)
    expect_tensor("labels", wanted)
    leading = 1 if packed else 2
    slots = "n_visits" if packed else "B, T"
    if found.dim() not in (leading, leading + 1):
        raise ValueError(
            f"predictions: expected [{slots}] or [{slots}, K], got shape {list(found.shape)}"
        )
    class_indices = found.dim() > leading and wanted.shape == found.shape[:leading]
    if not class_indices and wanted.shape != found.shape:
        raise ValueError(
            f"labels: expected the shape of predictions, {list(found.shape)}, or class "
            f"indices [{slots}] for predictions [{slots}, K], got shape {list(wanted.shape)}"
        )
    if class_indices:
        if wanted.is_floating_point() or wanted.is_complex():
            raise TypeError(
                f"labels: expected integers, class indices [{slots}] for predictions [{slots}, K], "
                f"got {wanted.dtype}"
            )
        wanted = wanted.long()
    elif not wanted.is_floating_point():
        wanted = wanted.to(found.dtype)

    if lengths is not None:
        rows = _rows_of_real_visits(lengths, found.shape[0], found.shape[1])
        rows = rows.to(found.device, non_blocking=True)
        found = found.flatten(0, 1).index_select(0, rows)
        wanted = wanted.flatten(0, 1).index_select(0, rows)
    loss = criterion(found, wanted)
    return loss.mean() if loss.dim() else loss


def _rows_of_real_visits(lengths: Tensor | Sequence[int], patients: int, visits: int) -> Tensor:
    """Positions of the real visits in the flattened ``[B * T]``, on the host."""
    if isinstance(lengths, Tensor):
        if values_are_hidden(lengths):
            raise RuntimeError(
                "lengths: expected values that choose the rows, which torch.func.vmap hides: give "
                "all patients in one call, or the same lengths to every sample, as a list"
            )
        lengths = unwrapped(lengths)
    with outside_transforms():
        return _rows_within(torch.from_numpy(whole("lengths", lengths)), patients, visits)


def _rows_within(lengths: Tensor, patients: int, visits: int) -> Tensor:
    if lengths.shape != (patients,):
        raise ValueError(f"lengths: expected [B] = [{patients}], got shape {list(lengths.shape)}")
    refuse_zero_lengths(lengths)
    outside = (lengths < 0) | (lengths > visits)
    if bool(outside.any()):
        first = int(outside.int().argmax())
        raise ValueError(
            f"Found {int(outside.sum())} lengths outside [1, T = {visits}]. The first is "
            f"{lengths[first].item()}, of patient {first}."
        )
    return (torch.arange(visits, device="cpu") < lengths[:, None]).flatten().nonzero().squeeze(1)
