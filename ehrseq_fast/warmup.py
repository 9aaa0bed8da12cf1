"""Compiling GPU kernels ahead of the first training step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import PackedVisits
from .next_codes import next_codes_bce
from .rows import PackedRows
from .survival_nll import (
    competing_risks_nll,
    discrete_time_survival_nll,
    packed_competing_risks_nll,
    packed_survival_nll,
)
from .triton_support import watching_launches
from .visit_pool import packed_visit_pool, visit_mean_pool
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
        device: a GPU; by default the current one, or the host where there is none.

    Returns:
        The names of the Triton kernels that ran. None ran where another backend serves these
        tensors (``python -m ehrseq_fast info`` says which and why): then there is nothing to do.

    Example:
        >>> import ehrseq_fast
        >>> with ehrseq_fast.use_backend("reference"):  # in training: what you train with
        ...     ehrseq_fast.warmup(patients=4, visits=3, codes=2, embedding_dim=8)
        []
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with watching_launches() as launches:
        for mode in modes:
            sizes = (patients, visits, codes, embedding_dim, vocab_size)
            _pool_once(*sizes, dtype, mode, code_weights, device)
        for count in (None, causes) if causes else (None,):
            _loss_once(patients, visits, count, from_logits, dtype, device)
        if next_codes:
            _codes_once(patients, visits, codes, vocab_size, dtype, device)
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
    device: torch.device,
) -> None:
    padded = _records(patients, visits, codes, vocab_size)
    weight = torch.zeros(vocab_size, embedding_dim, dtype=dtype, device=device, requires_grad=True)
    scores = None
    if mode == "attention":
        scores = torch.zeros(vocab_size, dtype=dtype, device=device, requires_grad=True)
    else:
        mask = torch.ones_like(padded, dtype=torch.bool).to(device)
        visit_mean_pool(padded.to(device), weight, mask, mode=mode).sum().backward()
    batch = PackedVisits.from_lists(padded.tolist()).to(device)
    packed_visit_pool(batch, weight, mode=mode, scores=scores).sum().backward()
    if code_weights and mode in WEIGHTED_MODES:
        of_codes = torch.ones(batch.n_codes, device=device, requires_grad=True)
        packed_visit_pool(batch, weight, mode=mode, code_weights=of_codes).sum().backward()


def _loss_once(
    patients: int,
    visits: int,
    causes: int | None,
    from_logits: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    outcomes = torch.zeros(patients, dtype=torch.int64, device=device)
    mask = torch.ones(patients, visits, dtype=torch.bool, device=device)
    batch = PackedVisits.from_lists([[[1]] * visits] * patients).to(device)
    shape = [patients, visits] if causes is None else [patients, visits, causes]

    def hazards(*shape: int) -> Tensor:
        return torch.full(shape, 0.5, dtype=dtype, device=device, requires_grad=True)

    if causes is None:
        padded = discrete_time_survival_nll(
            hazards(*shape), outcomes, outcomes, mask, from_logits=from_logits
        )
        packed = packed_survival_nll(
            hazards(patients * visits),
            batch,
            event_times=outcomes,
            event_indicators=outcomes,
            from_logits=from_logits,
        )
    else:
        padded = competing_risks_nll(
            hazards(*shape), outcomes, outcomes, mask, from_logits=from_logits
        )
        packed = packed_competing_risks_nll(
            hazards(patients * visits, causes),
            batch,
            event_times=outcomes,
            event_types=outcomes,
            from_logits=from_logits,
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
