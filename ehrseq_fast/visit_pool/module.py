"""``VisitPool``, visit pooling as a module that holds its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arrays import expect_tensor, kind_of
from ..autograd import values_are_hidden
from ..checks import expect_floating, expect_option, refuse_codes_outside
from .op import check_codes, padding_row, visit_mean_pool
from .packed import PACKED_MODES, codes_in_use, packed_visit_pool

if TYPE_CHECKING:
    from ..batch import PackedVisits

JOINS = ("cat", "sum")
Table = nn.Module | Tensor


class VisitPool(nn.Module):
    """Codes → one vector per visit, with the table (or a table for each code domain) in it.

    What it computes is :func:`~ehrseq_fast.visit_mean_pool` for padded codes and
    :func:`~ehrseq_fast.packed_visit_pool` for a :class:`~ehrseq_fast.PackedVisits`, with the same
    numbers. ``mode="attention"`` weighs the codes of a visit by the softmax of their scores,

        Σ_c softmax_c(s(W_c)) W_c   over the real codes c of the visit,

    where ``score`` maps a row W_c of the table to a number, on padded input as well: real codes are
    packed, each code in use is scored once, and nothing of the size ``[..., C, E]`` is held.

    Args:
        table: an ``nn.Embedding``, which stays the same module (its ``padding_idx`` and ``sparse``
            are used, and hooks, ``max_norm`` or an adapter around it are honoured by calling it);
            a tensor ``[K, E]``: an ``nn.Parameter`` is the module's parameter ``weight``, another
            tensor its buffer; or a dict of these by code domain.
        mode: ``"mean"``, ``"sum"``, ``"max"`` or ``"attention"``; with several tables one for all
            or a dict by domain.
        score: for attention, a module ``[n, E]`` → ``[n, 1]``; by default a two-layer network as in
            :class:`~ehrseq_fast.models.VisitEncoder`, with its names (``attention.0.weight``, ...).
            With several tables a dict by domain, or None.
        padding_idx: of a tensor, the row that gets no gradient. It is not a mask, here or in an
            embedding.
        join: how the vectors of several domains become one: ``"cat"`` puts them side by side in
            the dict's order, ``"sum"`` adds them.

    Raises:
        ValueError: an unknown mode or join, no table, a table that is not ``[K, E]``, ``score``
            without attention, domains that differ.
        TypeError: a table that is neither a module nor a floating tensor.
        IndexError: ``padding_idx`` outside the table.

    Example:
        >>> import torch
        >>> from ehrseq_fast import PackedVisits, VisitPool
        >>> embedding = torch.nn.Embedding(10, 4, padding_idx=0)
        >>> pool = VisitPool(embedding, mode="attention")
        >>> codes = torch.tensor([[[3, 5], [2, 0]]])  # one patient, two visits
        >>> padded = pool(codes, codes != 0)
        >>> packed = pool(PackedVisits.from_lists([[[3, 5], [2]]]))
        >>> padded.shape, torch.equal(padded[0], packed)
        (torch.Size([1, 2, 4]), True)
        >>> domains = VisitPool({"diagnoses": embedding, "drugs": torch.nn.Embedding(7, 2)})
        >>> domains({"diagnoses": codes, "drugs": codes}, {"diagnoses": codes != 0}).shape
        torch.Size([1, 2, 6])
    """

    def __init__(
        self,
        table: Table | Mapping[str, Table],
        mode: str | Mapping[str, str] = "mean",
        *,
        score: nn.Module | Mapping[str, nn.Module] | None = None,
        padding_idx: int | None = None,
        join: str = "cat",
    ) -> None:
        super().__init__()
        expect_option("join", join, JOINS)
        self.join = join
        self.domains: tuple[str, ...] | None = None
        if isinstance(table, (Mapping, nn.ModuleDict, nn.ParameterDict)):
            self._hold_domains(dict(table.items()), mode, score, padding_idx)
            return
        expect_option("mode", mode, PACKED_MODES)
        self.mode = str(mode)
        self.padding_idx = padding_idx
        self._hold_table(table)
        if mode != "attention":
            if score is not None:
                raise ValueError(f"score: expected None with mode={mode!r}, got {kind_of(score)}")
        elif score is None:
            tensors = [*self.parameters(), *self.buffers()]
            self.attention: nn.Module = _scorer(self._width(), tensors[0] if tensors else None)
        elif isinstance(score, nn.Module):
            self.attention = score
        else:
            raise TypeError(f"score: expected a module or None, got {kind_of(score)}")

    def _hold_table(self, table: object) -> None:
        if isinstance(table, nn.Module):
            if self.padding_idx is not None:
                raise ValueError(
                    "padding_idx: expected None beside an embedding, which has its own, got "
                    f"{self.padding_idx}"
                )
            self.embedding = table
            return
        if not isinstance(table, Tensor):
            raise TypeError(
                f"table: expected an nn.Embedding, a tensor or a dict of them, got {kind_of(table)}"
            )
        expect_floating("table", table)
        if table.dim() != 2:
            raise ValueError(f"table: expected [K, E], got {list(table.shape)}")
        padding_row(self.padding_idx, len(table))
        if isinstance(table, nn.Parameter):
            self.weight = table
        else:
            self.register_buffer("weight", table)

    def _hold_domains(
        self, tables: dict[str, Any], mode: Any, score: Any, padding_idx: int | None
    ) -> None:
        if not tables:
            raise ValueError("table: expected a table for each code domain, got an empty dict")
        if padding_idx is not None:
            raise ValueError(
                "padding_idx: expected None with several tables, whose embeddings have their own, "
                f"got {padding_idx}"
            )
        modes = mode if isinstance(mode, Mapping) else dict.fromkeys(tables, mode)
        _expect_domains("mode", modes, tables)
        scores = {} if score is None else score
        if not isinstance(scores, Mapping):
            raise TypeError(f"score: expected a dict by domain or None, got {kind_of(score)}")
        _refuse_unknown("score", scores, tables)
        self.domains = tuple(tables)
        # by number: a domain may have any name
        self.pools = nn.ModuleList(
            VisitPool(tables[name], modes[name], score=scores.get(name)) for name in tables
        )
        if self.join == "sum":
            widths = {name: pool._width() for name, pool in self._by_domain()}
            if len(set(widths.values())) > 1:
                raise ValueError(f'join="sum": expected tables of one width, got {widths}')

    def extra_repr(self) -> str:
        if self.domains is not None:
            return f"domains={list(self.domains)}, join={self.join!r}"
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"mode={self.mode!r}{padding}"

    def forward(
        self,
        codes: Any,
        mask: Any = None,
    ) -> Tensor:
        """``[..., E]`` for padded codes, ``[n_visits, E]`` in the batch's row order for a packed
        batch; of several domains, one vector per visit by ``join``.

        Args:
            codes: ``[..., C]`` int32 or int64, or a packed batch; with several tables a dict of
                either by domain, of the same patients and visits.
            mask: ``[..., C]`` bool or numeric, 0 where a slot is padding; without it every slot
                counts, padding too. A fractional mask is a weight; attention takes 0 and 1 alone.
                With several tables a dict by domain, or None. A packed batch takes none, and its
                weights of codes are used, or refused with max and attention.

        Raises:
            ValueError: for shapes that do not fit, a mask beside a packed batch, fractional masks
                with attention, domains that are missing or unknown, packed batches whose patients
                have other numbers of visits.
            IndexError: a code outside its table.
            TypeError: codes that are not int32 or int64.
        """
        if self.domains is not None:
            return self._pool_domains(codes, mask)
        if hasattr(codes, "index_visits"):
            if mask is not None:
                raise ValueError(f"mask: expected None beside a PackedVisits, got {kind_of(mask)}")
            return self._pool_packed(codes)
        if self.mode == "attention":
            return self._attend(codes, mask)
        return self._pool_padded(codes, mask)

    def _pool_domains(self, codes: Any, mask: Any) -> Tensor:
        assert self.domains is not None
        if not isinstance(codes, Mapping):
            raise TypeError(f"codes: expected a dict by domain, got {kind_of(codes)}")
        _expect_domains("codes", codes, self.domains)
        masks = {} if mask is None else mask
        if not isinstance(masks, Mapping):
            raise TypeError(f"mask: expected a dict by domain or None, got {kind_of(mask)}")
        _refuse_unknown("mask", masks, self.domains)
        _check_alike(self.domains, codes)
        vectors = [pool(codes[name], masks.get(name)) for name, pool in self._by_domain()]
        if self.join == "cat":
            return torch.cat(vectors, dim=-1)
        total = vectors[0]
        for vector in vectors[1:]:
            total = total + vector
        return total

    def _by_domain(self) -> list[tuple[str, Any]]:
        assert self.domains is not None
        return list(zip(self.domains, self.pools, strict=True))

    # One table

    def _pool_packed(self, batch: Any) -> Tensor:
        from ..models.visit_vectors import embed, pool_codes, pool_rows

        if self.mode == "attention" and self._is_read():
            # Each code in use is scored once. Rows of other codes may hold anything.
            rows = self._rows(batch.index_codes.long())
            scores = self._scores(rows)
            return packed_visit_pool(codes_in_use(batch), rows, mode="attention", scores=scores)
        if self.mode == "attention":
            rows = embed(self.embedding, batch.codes)
            return pool_rows(batch, rows, "attention", self._scores(rows))
        if "embedding" in self._modules:
            return pool_codes(self.embedding, batch, self.mode)
        return packed_visit_pool(batch, self.weight, mode=self.mode, padding_idx=self.padding_idx)

    def _pool_padded(self, codes: Tensor, mask: Any) -> Tensor:
        if "embedding" not in self._modules:
            return visit_mean_pool(
                codes, self.weight, mask, mode=self.mode, padding_idx=self.padding_idx
            )
        from ..models.visit_vectors import pool_weighted_codes

        if self._is_read():
            return pool_weighted_codes(self.embedding, codes, mask, self.mode)
        check_codes(codes, mask)
        flat = codes.reshape(-1, codes.shape[-1])
        real = torch.ones_like(flat, dtype=torch.bool) if mask is None else mask.reshape(flat.shape)
        pooled = pool_weighted_codes(self.embedding, flat, real, self.mode)
        return pooled.reshape(*codes.shape[:-1], pooled.shape[-1])

    def _attend(self, codes: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over padded codes: packed, each visit as a patient with one."""
        check_codes(codes, mask)
        unpacked = values_are_hidden(codes, mask) or torch.compiler.is_exporting()
        if unpacked or torch.jit.is_tracing() or not codes.numel():
            return self._attend_padded(codes, mask)
        flat = codes.reshape(-1, 1, codes.shape[-1])
        real = None if mask is None else mask.reshape(flat.shape)
        vocabulary = self._vocabulary()
        if vocabulary is not None and codes.device.type == "cpu":
            refuse_codes_outside(codes, vocabulary, mask)
        vectors = self._pool_packed(_packed(flat, real))  # of one visit each: rows in this order
        return vectors.reshape(*codes.shape[:-1], vectors.shape[-1])

    def _attend_padded(self, codes: Tensor, mask: Tensor | None) -> Tensor:
        """The definition, over every slot: where codes cannot be read as values."""
        from ..models.pooling import attend

        codes = codes if mask is None else codes.masked_fill(mask == 0, 0)
        return attend(self._rows(codes), mask, lambda rows: self._scores(rows).unsqueeze(-1))

    def _rows(self, codes: Tensor) -> Tensor:
        from ..models.visit_vectors import embed

        if "embedding" in self._modules:
            return embed(self.embedding, codes)
        return F.embedding(codes.long(), self.weight, self.padding_idx)

    def _scores(self, rows: Tensor) -> Tensor:
        from ..models.head import run_network

        flat = rows.flatten(0, -2)
        scores = run_network(self.attention, flat)
        n = flat.shape[0]
        if scores.shape not in ((n, 1), (n,)):
            raise ValueError(
                f"score: expected a module that gives [n, 1] = {[n, 1]}, got {list(scores.shape)}"
            )
        return scores.reshape(rows.shape[:-1]).to(rows.dtype)

    def _is_read(self) -> bool:
        """Whether rows are taken from the table; if not, the embedding is called for every code."""
        if "embedding" not in self._modules:
            return True
        from ..models.reading import is_plain_embedding

        return is_plain_embedding(self.embedding)

    def _vocabulary(self) -> int | None:
        if "embedding" not in self._modules:
            return len(self.weight)
        from ..models.visit_vectors import vocabulary_of

        return vocabulary_of(self.embedding)

    def _width(self) -> int:
        """Of a visit's vector."""
        if self.domains is not None:
            widths = [pool._width() for pool in self.pools]  # type: ignore[operator]
            return sum(widths) if self.join == "cat" else widths[0]
        if "embedding" not in self._modules:
            return self.weight.shape[1]
        width = getattr(self.embedding, "embedding_dim", None)
        if not isinstance(width, int):
            raise ValueError(
                f"table: expected an embedding with an embedding_dim, got "
                f"{type(self.embedding).__name__}; pass a score made for its width"
            )
        return width


@torch.compiler.disable
def _packed(codes: Tensor, mask: Tensor | None) -> PackedVisits:
    from ..batch import PackedVisits

    batch = PackedVisits.from_padded(codes, mask)
    if batch.code_weights is not None:
        raise ValueError("mask: expected 0 and 1 with mode='attention', got weights of codes")
    return batch


def _scorer(width: int, like: Tensor | None) -> nn.Sequential:
    options: Any = {} if like is None else {"device": like.device, "dtype": like.dtype}
    hidden = max(1, width // 2)
    return nn.Sequential(
        nn.Linear(width, hidden, **options), nn.Tanh(), nn.Linear(hidden, 1, **options)
    )


def _expect_domains(name: str, given: Mapping[str, Any], domains: Iterable[str]) -> None:
    missing = [domain for domain in domains if domain not in given]
    if missing:
        raise ValueError(
            f"{name}: expected an entry for each of {sorted(domains)}, got none for {missing}"
        )
    _refuse_unknown(name, given, domains)


def _refuse_unknown(name: str, given: Mapping[str, Any], domains: Iterable[str]) -> None:
    unknown = sorted(map(str, given.keys() - set(domains)))
    if unknown:
        raise ValueError(f"{name}: expected domains of {sorted(domains)}, got {unknown}")


def _check_alike(domains: Sequence[str], codes: Mapping[str, Any]) -> None:
    """All packed or all padded, and of the same patients and visits, as far as shapes say."""
    first = codes[domains[0]]
    for name in domains[1:]:
        other = codes[name]
        is_packed = hasattr(first, "index_visits")
        if is_packed != hasattr(other, "index_visits"):
            raise ValueError(
                f"codes: expected packed batches or padded tensors alike, got {kind_of(first)} "
                f"for {domains[0]!r} and {kind_of(other)} for {name!r}"
            )
        if is_packed:
            if not torch.equal(first.lengths, other.lengths):
                raise ValueError(
                    f"codes[{name!r}]: expected patients with as many visits as in "
                    f"codes[{domains[0]!r}], got {_first_other(first.lengths, other.lengths)}"
                )
        elif _visits(first) != _visits(other):
            raise ValueError(
                f"codes[{name!r}]: expected visits {_visits(first)} as codes[{domains[0]!r}], got "
                f"{_visits(other)}"
            )


def _visits(codes: Tensor) -> list[int]:
    expect_tensor("codes", codes, "padded codes or a PackedVisits")
    return list(codes.shape[:-1])


def _first_other(expected: Tensor, lengths: Tensor) -> str:
    if len(expected) != len(lengths):
        return f"{len(lengths)} patients, not {len(expected)}"
    at = int((expected != lengths).int().argmax())
    return f"patient {at}: {int(lengths[at])} visits, not {int(expected[at])}"
