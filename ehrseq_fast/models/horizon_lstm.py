"""The risk of the event within so many days, from every visit of a patient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import PackedVisits
from ..checks import accumulator, expect_option
from ..survival_nll import packed_survival_nll
from .base import VisitSequenceModel
from .head import called, logits_of
from .intervals import MICROSECONDS, boundaries, piecewise_nll, place
from .recurrent import visit_layer
from .sequences import expect_batch
from .visit_outcomes import check_outcomes, reads_values, visits_that_count

OUTPUTS = ("hazards", "logits", "risks")
REDUCTIONS = ("mean", "sum", "none")


def _head(hidden_dim: int, outputs: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(hidden_dim, hidden_dim),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden_dim, outputs),
    )


class HorizonSurvivalLSTM(VisitSequenceModel):
    """At every visit, the hazard of each interval of days since that visit: the risk within 30
    days, a year, ...

    Codes of a visit are embedded and averaged, an LSTM runs over the visits, and a small network
    maps each hidden state to J hazards: ``h_j = P(D ≤ b_j | D > b_{j−1})`` with D the days from
    that visit to the event and b the horizons. ``risk within b_j = 1 − Π_{k≤j} (1 − h_k)``.

    It is trained on all visits at once. The target of a visit is the days from it to the event or
    to the end of observation, ``batch.visit_targets["days_to_end"]``, and
    ``batch.event_indicators`` says which of the two it was. Its likelihood is that of a rate that
    is constant within each interval (:mod:`ehrseq_fast.models.intervals`: formula, sources, ties),
    so censoring inside an interval counts for the share that was seen. More horizons than are asked
    for make the rate finer: ``(7, 14, 30, 60, 90, 180, 270, 365)``.

    With ``visit_hazard=True`` a second head on the same states gives the hazard per visit of
    :class:`DiscreteTimeSurvivalLSTM`, and the loss is the sum of both.

    Masks, paths, padding and devices are as in :class:`DiscreteTimeSurvivalLSTM`. There is no
    bidirectional form: a risk that sees later visits is no forecast.

    Args:
        vocab_size: number of codes; code 0 is padding and its embedding is not trained.
        horizons_days: the ends of the intervals, ascending and above 0; J of them.
        embedding_dim: width E of a code's embedding.
        hidden_dim: width H of the LSTM state and of the heads.
        num_layers: LSTM layers.
        dropout: in the heads, and between LSTM layers where there are several.
        visit_hazard: whether to have the second head (``hazard_head``).
        visit_weight: what the loss of the second head is multiplied by.
        cell: ``"lstm"`` or ``"gru"``.
        path: ``"fused"``, ``"packed"`` or ``"padded"``.

    Raises:
        ValueError: for horizons that do not ascend from above 0, a negative weight, an unknown cell
            or path.

    Example:
        >>> import torch
        >>> from ehrseq_fast import PackedVisits
        >>> from ehrseq_fast.models import HorizonSurvivalLSTM
        >>> model = HorizonSurvivalLSTM(10, (30, 365), embedding_dim=4, hidden_dim=8).eval()
        >>> batch = PackedVisits.from_lists(
        ...     [[[3], [5]], [[7]]],
        ...     event_indicators=[1, 0],
        ...     visit_targets={"days_to_end": [torch.tensor([90.0, 20.0]), torch.tensor([400.0])]},
        ... )
        >>> model.loss(batch).backward()
        >>> model.predict_risk(batch).values.shape  # each visit, each horizon
        torch.Size([3, 2])
    """

    _bounds: Tensor

    def __init__(
        self,
        vocab_size: int,
        horizons_days: Iterable[float] = (30, 90, 180, 365, 730),
        embedding_dim: int = 128,
        hidden_dim: int = 256,
        num_layers: int = 1,
        dropout: float = 0.1,
        *,
        visit_hazard: bool = False,
        visit_weight: float = 1.0,
        cell: str = "lstm",
        path: str = "fused",
    ) -> None:
        super().__init__(path)
        if not (math.isfinite(visit_weight) and visit_weight >= 0):
            raise ValueError(f"visit_weight: expected a finite weight from 0, got {visit_weight}")
        self.horizons_days = boundaries(horizons_days)
        self.vocab_size = vocab_size
        self.embedding_dim = embedding_dim
        self.hidden_dim = hidden_dim
        self.num_layers = num_layers
        self.visit_weight = visit_weight
        self.embedding = nn.Embedding(vocab_size, embedding_dim, padding_idx=0)
        self.lstm = visit_layer(cell, embedding_dim, hidden_dim, num_layers, dropout)
        self.horizon_head = _head(hidden_dim, len(self.horizons_days), dropout)
        self.hazard_head = _head(hidden_dim, 1, dropout) if visit_hazard else None
        self.register_buffer("_bounds", self._boundaries(), persistent=False)

    def _boundaries(self, device: torch.device | None = None) -> Tensor:
        """As integers, which a model keeps when it is turned to another floating dtype."""
        bounds = [0, *(round(day * MICROSECONDS) for day in self.horizons_days)]
        return torch.tensor(bounds, device=device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """``to_empty`` gives buffers memory without contents, and no ``state_dict`` has the
        boundaries."""
        before = self._bounds
        super()._apply(fn, recurse)
        if self._bounds is not before and not self._bounds.is_meta:
            self._bounds = self._boundaries(self._bounds.device)
        return self

    @property
    def visit_hazard(self) -> bool:
        """Whether the model has the head for the hazard per visit."""
        return self.hazard_head is not None

    def forward(
        self,
        visit_codes: Tensor | PackedVisits,
        visit_mask: Tensor | None = None,
        sequence_mask: Tensor | None = None,
        *,
        output: str = "hazards",
    ) -> Any:
        """Of a :class:`~ehrseq_fast.PackedVisits` :class:`~ehrseq_fast.PackedRows`
        ``[n_visits, J]``, of padded codes ``[B, V, J]`` with zeros on padding.

        With ``visit_hazard=True`` a dictionary: ``"horizons"`` as above, ``"visit"``
        ``[n_visits]`` or ``[B, V]``.

        Args:
            visit_codes, visit_mask, sequence_mask: as in :class:`DiscreteTimeSurvivalLSTM`.
            output: ``"hazards"`` in (0, 1), in the model's dtype; their ``"logits"``; or
                ``"risks"``, the risk within each horizon (``"visit"`` stays the hazard), in float32
                for a 16-bit model.

        Raises:
            ValueError: for shapes that do not fit, patients without a visit, masks with holes, an
                unknown output.
            IndexError: for codes outside the vocabulary.
            TypeError: for codes that are not int32 or int64.
        """
        expect_option("output", output, OUTPUTS)
        states = self._hidden_states(visit_codes, visit_mask, sequence_mask)
        found = self._outputs(states.values, output)
        if isinstance(found, dict):
            return {name: states.to_output(values) for name, values in found.items()}
        return states.to_output(found)

    def _output(self, states: Tensor) -> Any:
        return self._outputs(states, "hazards")

    def _outputs(self, states: Tensor, output: str) -> Tensor | dict[str, Tensor]:
        horizons = self._apply_logits(self.horizon_head, states)
        if output == "risks":
            horizons = _risks(horizons)
        elif output == "hazards":
            horizons = horizons.sigmoid()
        if self.hazard_head is None:
            return horizons
        visit = self._apply_logits(self.hazard_head, states).squeeze(-1)
        return {"horizons": horizons, "visit": visit if output == "logits" else visit.sigmoid()}

    def _apply_logits(self, head: nn.Module, states: Tensor) -> Tensor:
        return logits_of(head, states) if self.path == "fused" else called(head, states)

    def predict_risk(
        self,
        visit_codes: Tensor | PackedVisits,
        visit_mask: Tensor | None = None,
        sequence_mask: Tensor | None = None,
    ) -> Any:
        """The risk within each horizon from each visit, given no event up to that visit:
        ``1 − Π_{k≤j} (1 − h_k)``, from logits, so that small risks keep their digits.

        :class:`~ehrseq_fast.PackedRows` ``[n_visits, J]``, or ``[B, V, J]`` with zeros on padding;
        float32 for a 16-bit model. Arguments and errors as in :meth:`forward`. Call
        ``model.eval()`` first: dropout is active in training mode.
        """
        found = self(visit_codes, visit_mask, sequence_mask, output="risks")
        return found["horizons"] if isinstance(found, dict) else found

    def loss(
        self,
        batch: PackedVisits,
        *,
        entry_times: Tensor | None = None,
        sample_weight: Tensor | None = None,
        censored_visit: str | None = None,
        reduction: str = "mean",
        validate: bool = False,
    ) -> Tensor:
        """From codes to the negative log-likelihood of the batch's outcomes, nothing padded.

        A patient's loss is the **sum** over visits ``t`` with ``entry ≤ t ≤ event_times`` of the
        visit's likelihood, and with ``visit_hazard=True`` ``visit_weight`` times that of
        :class:`DiscreteTimeSurvivalLSTM`, which is a sum over visits too. It is not their mean: how
        many visits a record has is known at its end alone and goes with the outcome, so weights of
        1/visits would overstate the hazards of those who have the event soon.

        Args:
            batch: patients with ``event_indicators`` and ``visit_targets["days_to_end"]``
                ``[n_visits]``, the days from each visit to the event or the end of observation;
                with ``event_times`` too, needed for the hazard per visit, later visits do not
                count.
            entry_times: ``[B]`` integer: the first visit that counts; by default
                ``batch.targets["entry_times"]`` where the batch has them, else 0.
            sample_weight: ``[B]``: multiplies each patient's loss.
            censored_visit: for the hazard per visit, ``"excluded"`` (default) or ``"included"``.
            reduction: ``"mean"`` over patients, ``"sum"``, or ``"none"`` for ``[B]``.
            validate: check values on a GPU too, at the price of a synchronisation.

        Returns:
            The loss, float64 for float64 and float32 otherwise.

        Raises:
            ValueError: a batch without these outcomes; days that are NaN or negative on a visit
                that counts; entry times outside a patient's visits; negative weights; an unknown
                option.
            TypeError: for anything but a packed batch.
        """
        expect_batch(batch)
        expect_option("reduction", reduction, REDUCTIONS)
        if censored_visit is not None and not self.visit_hazard:
            raise ValueError(
                "censored_visit: expected None without visit_hazard=True, as censoring is in days "
                f"here, got {censored_visit!r}"
            )
        if entry_times is None:
            entry_times = batch.targets.get("entry_times")
        days, event = self._outcomes(batch)
        counts = visits_that_count(batch, entry_times)
        if sample_weight is not None and sample_weight.shape != (len(batch),):
            raise ValueError(
                f"sample_weight: expected [B] = [{len(batch)}], got {list(sample_weight.shape)}"
            )
        if reads_values(days, validate):
            check_outcomes(batch, days, counts, entry_times, sample_weight)
        found = self(batch, output="logits")
        rows = found["horizons"] if isinstance(found, dict) else found
        bounds = self._bounds
        if bounds.is_meta:  # load_state_dict(assign=True) gives the weights alone a device
            bounds = self._boundaries(days.device)
        bounds = bounds.double() / MICROSECONDS
        interval, fraction, beyond = place(days.double(), bounds)
        per_visit = piecewise_nll(
            rows.values,
            torch.where(counts, interval, 0),
            torch.where(counts, fraction, 0.0),
            event & counts & ~beyond,
        )
        nll = batch.pad(per_visit).sum(1)
        if sample_weight is not None:
            nll = nll * sample_weight.to(nll.dtype)
        if isinstance(found, dict):
            visit = packed_survival_nll(
                found["visit"],
                batch,
                from_logits=True,
                censored_visit=censored_visit or "excluded",
                entry_times=entry_times,
                sample_weight=sample_weight,
                reduction="none",
                validate=validate,
            )
            nll = nll + self.visit_weight * visit
        if reduction == "none":
            return nll
        total = _sum(nll)
        return total / len(batch) if reduction == "mean" else total

    @torch.no_grad()
    def set_base_hazards(
        self, horizons: Sequence[float] | Tensor, visit: float | None = None
    ) -> None:
        """Let the heads' last biases say these hazards, from which training then starts: the
        observed ones (:func:`~ehrseq_fast.models.intervals.interval_hazards`; events per visit at
        risk), and not 0.5, which costs the first epochs.

        Args:
            horizons: J hazards in (0, 1), one for each interval.
            visit: the hazard per visit, with ``visit_hazard=True``.

        Raises:
            ValueError: for another number of hazards, hazards outside (0, 1), and one for a head
                that the model does not have.

        Example:
            >>> from ehrseq_fast.models import HorizonSurvivalLSTM
            >>> model = HorizonSurvivalLSTM(10, (30, 365), embedding_dim=4, hidden_dim=8)
            >>> model.set_base_hazards([0.01, 0.1])
            >>> model.horizon_head[3].bias.detach().sigmoid()
            tensor([0.0100, 0.1000])
        """
        targets: list[tuple[Any, Any, Any]] = [("horizons", self.horizon_head, horizons)]
        if visit is not None:
            if self.hazard_head is None:
                raise ValueError("visit: expected None without visit_hazard=True, got a hazard")
            targets.append(("visit", self.hazard_head, [visit]))
        logits = []
        for name, head, hazards in targets:
            bias = head[3].bias
            given = torch.as_tensor(hazards, dtype=torch.float64, device=bias.device)
            if given.shape != bias.shape:
                raise ValueError(f"{name}: expected {len(bias)} hazards, got {list(given.shape)}")
            if not bool(((given > 0) & (given < 1)).all()):
                raise ValueError(f"{name}: expected hazards in (0, 1), got {given.tolist()}")
            logits.append((bias, given.logit()))
        for bias, logit in logits:
            bias.copy_(logit)

    def _outcomes(self, batch: PackedVisits) -> tuple[Tensor, Tensor]:
        """Days ``[n_visits]``, and whether they end with the event."""
        days = batch.visit_targets.get("days_to_end")
        if days is None:
            raise ValueError(
                "batch.visit_targets: expected 'days_to_end', the days from each visit to the "
                f"event or the end of observation, got {sorted(batch.visit_targets)}"
            )
        if days.shape != (batch.n_visits,):
            raise ValueError(
                f"visit_targets['days_to_end']: expected [n_visits] = [{batch.n_visits}], got "
                f"{list(days.shape)}"
            )
        if batch.event_indicators is None:
            raise ValueError("batch.event_indicators: expected one per patient, got None")
        return days, (batch.event_indicators != 0)[batch.patient_of_row]


def _risks(logits: Tensor) -> Tensor:
    """1 − Π (1 − σ(z)) over the last dimension."""
    wide = logits.to(accumulator(logits.dtype))
    return -torch.expm1(nn.functional.logsigmoid(-wide).cumsum(-1))


def _sum(values: Tensor) -> Tensor:
    """The sum in an order that does not depend on the number of threads."""
    while len(values) > 1:
        width = min(len(values), 1024)
        rows = nn.functional.pad(values, (0, -len(values) % width))
        values = rows.unflatten(0, (-1, width)).sum(1)
    return values.sum()
