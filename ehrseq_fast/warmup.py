"""Compiling GPU kernels ahead of the first training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .batch import PackedVisits
from .checks import accumulator, expect_option
from .deephit_ranking import deephit_competing_ranking_loss, deephit_ranking_loss
from .fixed_horizon import fixed_horizon_bce
from .losses import FixedHorizonProgressionLoss
from .next_codes import next_codes_bce
from .piecewise_hazard import piecewise_hazard_nll
from .pmf_nll import pmf_competing_risks_nll, pmf_nll
from .rows import PackedRows
from .survival_nll import (
    competing_risks_nll,
    discrete_time_survival_nll,
    packed_competing_risks_nll,
    packed_survival_nll,
)
from .triton_support import watching_launches
from .visit_cross_entropy import visit_cross_entropy
from .visit_pool import masked_pool, packed_visit_pool, visit_mean_pool
from .visit_pool.packed import WEIGHTED_MODES


def warmup(
    *,
    patients: int,
    visits: int,
    codes: int,
    embedding_dim: int,
    vocab_size: int = 1024,
    dtype: torch.dtype = torch.float32,
    modes: Sequence[str] = ("mean",),
    causes: int | None = None,
    from_logits: bool = False,
    next_codes: bool = False,
    code_weights: bool = False,
    visit_weights: bool = False,
    sparse_grad: bool = False,
    embeddings: bool = False,
    losses: Sequence[str] = (),
    classes: int = 2,
    device: torch.device | str | None = None,
) -> list[str]:
    """Compile what training on such batches will launch, so that no training step waits for it.

    Triton compiles a kernel when it is first launched with arguments of new types, and keeps it on
    disk (``TRITON_CACHE_DIR``). This runs pooling and survival losses once, forward and backward,
    padded and packed, on synthetic records of the given size. Lengths and batch sizes do not select
    the kernel to the last number: one batch of the usual size is enough for those like it.

    Args:
        patients, visits, codes: a typical batch ``[B, V, C]``.
        embedding_dim: the width of a visit vector.
        vocab_size: rows of the embedding table.
        dtype: of the embedding table and of the hazards (give autocast's, to train under autocast).
        modes: of visit pooling: ``"mean"``, ``"sum"``, ``"max"``, ``"attention"`` (packed alone).
        causes: competing risks to compile the loss for as well; None compiles the single-risk loss
            alone.
        from_logits: whether the losses are to take logits.
        next_codes: compile :func:`~ehrseq_fast.next_codes_bce` too, without weights of classes.
        code_weights: compile pooling with weights per code and their gradient too, in the modes
            that have it.
        visit_weights: compile the losses of hazards, and of rates, with weights of visits too.
        sparse_grad: compile pooling with sparse gradients of the table too, in the modes that
            have them.
        embeddings: compile :func:`~ehrseq_fast.masked_pool` too, of embeddings that exist, in the
            modes that it has.
        losses: which other losses to compile too, by name: ``"pmf_nll"``,
            ``"deephit_ranking_loss"`` (with ``causes`` also those of competing risks),
            ``"piecewise_hazard_nll"`` (both links), ``"visit_cross_entropy"``,
            ``"fixed_horizon_bce"`` (in visits, in days, and of given labels). Event times and types
            are taken to be int64, masks bool, days and fractions float32.
        classes: how many :func:`~ehrseq_fast.visit_cross_entropy` is to have.
        device: a GPU; by default the current one, or the host where there is none.

    Returns:
        The names of the Triton kernels that ran. None ran where another backend serves these
        tensors (``python -m ehrseq_fast info`` says which and why): then there is nothing to do.

    Raises:
        ValueError: for a loss of another name.

    Example:
        >>> import ehrseq_fast
        >>> with ehrseq_fast.use_backend("reference"):  # in training: what you train with
        ...     ehrseq_fast.warmup(patients=4, visits=3, codes=2, embedding_dim=8)
        []
    """
    for name in losses:
        expect_option("losses", name, _OTHER_LOSSES)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with watching_launches() as launches:
        for mode in modes:
            sizes = (patients, visits, codes, embedding_dim, vocab_size)
            is_sparse = sparse_grad and mode != "attention"
            for sparse in (False, True) if is_sparse else (False,):
                _pool_once(*sizes, dtype, mode, code_weights, sparse, device)
        for count in (None, causes) if causes else (None,):
            for weighted in (False, True) if visit_weights else (False,):
                _loss_once(patients, visits, count, from_logits, weighted, dtype, device)
        if next_codes:
            _codes_once(patients, visits, codes, vocab_size, dtype, device)
        if embeddings:
            _embeddings_once(patients * visits, codes, embedding_dim, dtype, modes, device)
        for name in losses:
            records = _Records(patients, visits, dtype, device, visit_weights)
            _OTHER_LOSSES[name](records, causes, classes)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return sorted({launch.name for launch in launches})


def _records(patients: int, visits: int, codes: int, vocab_size: int) -> Tensor:
    return torch.arange(patients * visits * codes).reshape(patients, visits, codes) % vocab_size


def _pool_once(
    patients: int,
    visits: int,
    codes: int,
    embedding_dim: int,
    vocab_size: int,
    dtype: torch.dtype,
    mode: str,
    code_weights: bool,
    sparse_grad: bool,
    device: torch.device,
) -> None:
    options: Any = {"mode": mode, "sparse_grad": sparse_grad}
    padded = _records(patients, visits, codes, vocab_size)
    weight = torch.zeros(vocab_size, embedding_dim, dtype=dtype, device=device, requires_grad=True)
    scores = None
    if mode == "attention":
        scores = torch.zeros(vocab_size, dtype=dtype, device=device, requires_grad=True)
    else:
        mask = torch.ones_like(padded, dtype=torch.bool).to(device)
        visit_mean_pool(padded.to(device), weight, mask, **options).sum().backward()
    batch = PackedVisits.from_lists(padded.tolist()).to(device)
    packed_visit_pool(batch, weight, scores=scores, **options).sum().backward()
    if code_weights and mode in WEIGHTED_MODES:
        of_codes = torch.ones(batch.n_codes, device=device, requires_grad=True)
        packed_visit_pool(batch, weight, code_weights=of_codes, **options).sum().backward()


def _loss_once(
    patients: int,
    visits: int,
    causes: int | None,
    from_logits: bool,
    weighted: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    outcomes = torch.zeros(patients, dtype=torch.int64, device=device)
    mask = torch.ones(patients, visits, dtype=torch.bool, device=device)
    batch = PackedVisits.from_lists([[[1]] * visits] * patients).to(device)
    shape = [patients, visits] if causes is None else [patients, visits, causes]
    weight = None
    if weighted:
        weight = torch.ones(patients, visits, dtype=accumulator(dtype), device=device)
    options: Any = {"from_logits": from_logits, "visit_weight": weight}
    of_rows = {**options, "visit_weight": None if weight is None else weight.flatten()}

    def hazards(*shape: int) -> Tensor:
        return torch.full(shape, 0.5, dtype=dtype, device=device, requires_grad=True)

    if causes is None:
        padded = discrete_time_survival_nll(hazards(*shape), outcomes, outcomes, mask, **options)
        packed = packed_survival_nll(
            hazards(patients * visits),
            batch,
            event_times=outcomes,
            event_indicators=outcomes,
            **of_rows,
        )
    else:
        padded = competing_risks_nll(hazards(*shape), outcomes, outcomes, mask, **options)
        packed = packed_competing_risks_nll(
            hazards(patients * visits, causes),
            batch,
            event_times=outcomes,
            event_types=outcomes,
            **of_rows,
        )
    (padded + packed).backward()


def _codes_once(
    patients: int,
    visits: int,
    codes: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    batch = PackedVisits.from_lists(_records(patients, visits, codes, vocab_size).tolist())
    rows = PackedRows(torch.zeros(batch.n_visits, 1, dtype=dtype), batch).to(device)
    weight = torch.zeros(vocab_size, 1, dtype=dtype, device=device, requires_grad=True)
    next_codes_bce(rows, weight).backward()
    with torch.no_grad():
        next_codes_bce(rows, weight)


def _embeddings_once(
    visits: int,
    codes: int,
    embedding_dim: int,
    dtype: torch.dtype,
    modes: Sequence[str],
    device: torch.device,
) -> None:
    shape = (visits, codes, embedding_dim)
    embeddings = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
    mask = torch.ones(visits, codes, dtype=torch.bool, device=device)
    for mode in modes:
        if mode != "attention":
            masked_pool(embeddings, mask, mode=mode).sum().backward()


class _Records:
    """Patients with visits alone, padded and packed, and zeros for whatever a loss takes."""

    def __init__(
        self,
        patients: int,
        visits: int,
        dtype: torch.dtype,
        device: torch.device,
        visit_weights: bool,
    ) -> None:
        self.shape = (patients, visits)
        self.dtype, self.device = dtype, device
        self.batch = PackedVisits.from_lists([[[1]] * visits] * patients).to(device)
        self.mask = torch.ones(self.shape, dtype=torch.bool, device=device)
        self.outcomes = torch.zeros(patients, dtype=torch.int64, device=device)
        self.weights = [None, self.of_visits(accumulator(dtype))] if visit_weights else [None]

    def padded(self, *classes: int) -> Tensor:
        options: Any = {"dtype": self.dtype, "device": self.device, "requires_grad": True}
        return torch.zeros(*self.shape, *classes, **options)

    def packed(self, *classes: int) -> PackedRows:
        return PackedRows(self.padded(*classes).flatten(0, 1), self.batch)

    def of_visits(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.shape, dtype=dtype, device=self.device)


def _over_time(
    single: Callable[..., Tensor], competing: Callable[..., Tensor]
) -> Callable[[_Records, int | None, int], None]:
    def run(records: _Records, causes: int | None, classes: int) -> None:
        outcomes = (records.outcomes, records.outcomes)
        for loss, shape in ((single, ()), *([(competing, (causes,))] if causes else [])):
            padded = loss(records.padded(*shape), *outcomes, records.mask)
            (padded + loss(records.packed(*shape), *outcomes)).backward()

    return run


def _rates_once(records: _Records, causes: int | None, classes: int) -> None:
    outcomes = (records.outcomes, records.outcomes, records.outcomes.float())
    for link in ("softplus", "exp"):
        for weight in records.weights:
            options: Any = {"link": link, "visit_weight": weight}
            padded = piecewise_hazard_nll(records.padded(), *outcomes, records.mask, **options)
            options["visit_weight"] = None if weight is None else weight.flatten()
            (padded + piecewise_hazard_nll(records.packed(), *outcomes, **options)).backward()


def _classes_once(records: _Records, causes: int | None, classes: int) -> None:
    labels = records.of_visits(torch.int64)
    padded = visit_cross_entropy(records.padded(classes), labels, records.mask)
    (padded + visit_cross_entropy(records.packed(classes), labels.flatten())).backward()


def _horizon_once(records: _Records, causes: int | None, classes: int) -> None:
    outcomes = (records.outcomes, records.outcomes, 1)
    days = records.of_visits(torch.float32)
    for padded, packed in ((None, None), (days, days.flatten())):
        total = fixed_horizon_bce(records.padded(), *outcomes, records.mask, visit_times=padded)
        total = total + fixed_horizon_bce(records.packed(), *outcomes, visit_times=packed)
        total.backward()
    labels = records.of_visits(torch.int64)
    FixedHorizonProgressionLoss()(records.padded(), labels, records.mask).backward()


_OTHER_LOSSES: dict[str, Callable[[_Records, int | None, int], None]] = {
    "pmf_nll": _over_time(pmf_nll, pmf_competing_risks_nll),
    "deephit_ranking_loss": _over_time(deephit_ranking_loss, deephit_competing_ranking_loss),
    "piecewise_hazard_nll": _rates_once,
    "visit_cross_entropy": _classes_once,
    "fixed_horizon_bce": _horizon_once,
}
