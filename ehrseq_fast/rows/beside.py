"""What a loss or a metric is given beside rows: their batch with its outcomes, or other rows."""

from __future__ import annotations

from typing import Any

from ..batch import PackedVisits
from .packed_rows import PackedRows

# where the visits of a batch are: visit t of patient p is row row_starts[t] + unsorted_indices[p]
ROWS = ("row_starts", "unsorted_indices", "last_rows")


def fields_of(batch: Any, *names: str) -> tuple[Any, ...]:
    """Several attributes of a batch, or of what is used as one."""
    if isinstance(batch, PackedVisits):
        return batch.fields(*names)
    return tuple([getattr(batch, name) for name in names])


def with_batch(rows: Any, given: Any, name: str, argument: str = "event_times") -> tuple[Any, Any]:
    """``rows`` and ``given`` as they are; of ``loss(rows, batch)`` the rows of that batch, whose
    outcomes are then the default, and None.

    Raises:
        ValueError: a batch of other visits.
        TypeError: a batch beside something that is no PackedRows.
    """
    if not isinstance(given, PackedVisits):
        return rows, given
    if not isinstance(rows, PackedRows):
        raise TypeError(
            f"{argument}: expected a tensor beside a tensor of {name}, got a PackedVisits; for the "
            f"outcomes of a batch {name} must be its rows, PackedRows(values, batch)"
        )
    if not given.same_visits(rows.batch):
        raise ValueError(
            f"{argument}: expected the batch of the PackedRows in {name}, or a copy of it with "
            f"other outcomes, got another of {given.n_patients} patients and {given.n_visits} "
            f"visits; PackedRows({name}.values, batch) says that they are its rows"
        )
    return PackedRows(rows.values, given), None


def values_beside(rows: Any, given: Any, name: str) -> Any:
    """``given`` as it is; of PackedRows their values, which must be of the same visits as
    ``rows``.

    Raises:
        ValueError: rows of other visits.
        TypeError: rows beside something that is no PackedRows.
    """
    if not isinstance(given, PackedRows):
        return given
    if not isinstance(rows, PackedRows):
        raise TypeError(
            f"{name}: expected a tensor, as the predictions are one, got PackedRows: pass "
            f"{name}.to_padded()"
        )
    if not given.batch.same_visits(rows.batch):
        raise ValueError(
            f"{name}: expected rows of the same batch as the predictions, got those of another; "
            f"{name}.values is a tensor without a batch"
        )
    return given.values
