"""Codes of visits → visit vectors, nothing padded: from the embedding's table, or by calling it.

The kernels read the table. Where the embedding has hooks or was changed
(:mod:`~ehrseq_fast.models.reading`) it is called instead, once, on the flat codes, and the rows
that it returns are pooled by the same kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..batch import PackedVisits
from ..checks import refuse_codes_outside
from ..visit_pool import masked_pool, packed_visit_pool, visit_mean_pool
from ..visit_pool.packed import PackedCodes
from .reading import is_plain_embedding


def pool_codes(embedding: nn.Module, batch: PackedVisits, mode: str) -> Tensor:
    """A packed batch → ``[n_visits, E]`` by mean, sum or max."""
    if is_plain_embedding(embedding):
        return packed_visit_pool(batch, embedding.weight, mode=mode, **_options(embedding))
    return pool_rows(batch, embed(embedding, batch.codes), mode)


def pool_weighted_codes(embedding: nn.Module, codes: Tensor, mask: Tensor, mode: str) -> Tensor:
    """Codes ``[N, C]`` and their weights → ``[N, E]`` by mean, sum or max."""
    if is_plain_embedding(embedding):
        return visit_mean_pool(codes, embedding.weight, mask, mode=mode, **_options(embedding))
    return masked_pool(embed_real(embedding, codes, mask), mask, mode=mode)


def pool_rows(batch: PackedVisits, rows: Tensor, mode: str, scores: Tensor | None = None) -> Tensor:
    """Rows ``[n_codes, E]``, one per code of the batch → ``[n_visits, E]``; ``scores``
    ``[n_codes]`` for attention."""
    ids = torch.arange(batch.n_codes + 1, dtype=torch.int32, device=batch.codes.device)
    # The rows are a table of which each code takes its own row.
    codes = PackedCodes(
        ids[:-1],
        batch.code_offsets,
        ids[:-1],
        ids,
        batch.row_of_code.int(),
        batch.code_weights,
    )
    return packed_visit_pool(codes, rows, mode=mode, scores=scores)


def embed(embedding: nn.Module, codes: Tensor) -> Tensor:
    """``embedding`` called on flat codes, ``[n_codes]`` → ``[n_codes, E]``.

    Raises:
        IndexError: as the embedding does; with the first such code where the embedding says how
            many rows it has.
    """
    try:
        return embedding(codes.long())
    except IndexError as error:
        vocab_size = vocabulary_of(embedding)
        if vocab_size is not None:
            try:
                refuse_codes_outside(codes, vocab_size)
            except IndexError as outside:
                raise outside from error
        raise


def embed_real(embedding: nn.Module, codes: Tensor, mask: Tensor) -> Tensor:
    """``embedding`` called on the codes whose mask is not zero: ``[N, C]`` → ``[N, C, E]``, zeros
    at all others."""
    slots = (mask != 0).flatten().nonzero().squeeze(1)
    rows = embed(embedding, codes.flatten().index_select(0, slots))
    return _spread(rows, slots, tuple(codes.shape))


def padded_embeddings(embedding: nn.Module, batch: PackedVisits) -> tuple[Tensor, Tensor]:
    """``embedding`` called on the flat codes of a batch: ``[n_visits, C, E]`` with zeros where a
    visit has fewer codes than the largest, and the mask of real codes ``[n_visits, C]``, which
    holds the weights of codes of a batch that has any.

    For a visit encoder that has to be called, and takes no other form. Waits for a GPU, for C.
    """
    counts = batch.code_offsets.diff()
    width = max(1, int(counts.max())) if batch.n_codes else 1
    row_of_code = batch.row_of_code
    place = torch.arange(batch.n_codes, device=batch.device) - batch.code_offsets[row_of_code]
    slots = row_of_code * width + place
    embeddings = _spread(embed(embedding, batch.codes), slots, (batch.n_visits, width))
    if batch.code_weights is not None:
        zeros = batch.code_weights.new_zeros(batch.n_visits * width)
        mask = zeros.index_copy(0, slots, batch.code_weights)
        return embeddings, mask.unflatten(0, (batch.n_visits, width))
    return embeddings, torch.arange(width, device=batch.device) < counts.unsqueeze(1)


def vocabulary_of(embedding: nn.Module) -> int | None:
    """How many rows the embedding has; None where it does not say (a wrapper)."""
    size = getattr(embedding, "num_embeddings", None)
    return size if isinstance(size, int) else None


def _spread(rows: Tensor, slots: Tensor, shape: tuple[int, ...]) -> Tensor:
    zeros = rows.new_zeros(shape[0] * shape[1], rows.shape[-1])
    return zeros.index_copy(0, slots, rows).unflatten(0, shape)


def _options(embedding: nn.Embedding) -> dict[str, Any]:
    return {"padding_idx": embedding.padding_idx, "sparse_grad": embedding.sparse}
