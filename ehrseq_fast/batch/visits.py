"""From visit to visit of the same patient: reverse order, the visit before, the next one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .fill import check_fill
from .rows import Rows


class NextVisitCodes(NamedTuple):
    """The codes of each visit's next one, ragged; see :meth:`PackedVisits.next_visit_codes`.

    Attributes:
        rows: int64 ``[n]``, the rows whose patient has a next visit, in the order of these next
            visits. Each is there once.
        codes: int32 ``[n_next_codes]``, the codes of the next visits.
        offsets: int32 ``[n + 1]``, from 0: the visit after ``rows[i]`` holds
            ``codes[offsets[i]:offsets[i + 1]]``, possibly nothing.
    """

    rows: Tensor
    codes: Tensor
    offsets: Tensor


class Visits(Rows):
    """A batch's rows in the order of each patient's time."""

    def reversed_rows(self) -> Tensor:
        """int64 ``[n_visits]``: at visit t of each patient the row of its visit length − 1 − t.

        Example:
            >>> from ehrseq_fast.batch import PackedVisits
            >>> PackedVisits.from_lists([[[1]], [[2], [3]]]).reversed_rows()
            tensor([2, 1, 0])
        """
        time, rank = self._time_and_rank()
        last = self.last_rows[self.sorted_indices][rank]
        last_time = torch.searchsorted(self.row_starts[1:], last, right=True)
        return self.row_starts[last_time - time] + rank

    def shift_rows(self, values: Tensor, n: int = 1, fill: float = 0) -> Tensor:
        """Rows ``[n_visits, ...]`` to those n visits before (after, with a negative n) of the same
        patient, ``fill`` where there is none. Differentiable.

        Raises:
            ValueError: if ``values`` has not one row per visit, or its dtype does not hold
                ``fill``.
            TypeError: if ``fill`` is no number.

        Example:
            >>> import torch
            >>> from ehrseq_fast.batch import PackedVisits
            >>> batch = PackedVisits.from_lists([[[1]], [[2], [3]]])
            >>> batch.shift_rows(torch.tensor([20, 10, 30]), -1)
            tensor([30,  0,  0])
        """
        self._check_rows("values", values)
        check_fill(fill, values.dtype)
        time, rank = self._time_and_rank()
        there = time - n
        last = self.max_visits
        ends = self.row_starts[(there + 1).clamp(0, last)]
        source = self.row_starts[there.clamp(0, last)] + rank
        exists = (there >= 0) & (source < ends)
        # Where there is no such visit any row will do: the gradient that it is sent is 0.
        shifted = values.index_select(0, torch.where(exists, source, 0))
        return shifted.masked_fill(~exists.reshape(-1, *[1] * (values.dim() - 1)), fill)

    def rows_with_next(self) -> Tensor:
        """int64 ``[n_visits - n_patients]``: for each visit but the first ones, in row order, the
        row of the visit before it: every row that has a next visit, once."""
        rows = torch.arange(self.n_patients, self.n_visits, device=self.device)
        time = torch.searchsorted(self.row_starts[1:], rows, right=True)
        return self.row_starts[time - 1] + rows - self.row_starts[time]

    def next_visit_codes(self) -> NextVisitCodes:
        """What is to be predicted at each visit that has a next one: the codes of that next visit.

        ``states[targets.rows]`` are the states to predict from. A patient's last visit has no
        target, and a patient of one visit none at all. On a GPU this waits for the device, for the
        number of codes of the first visits; the same without a wait is ``batch.rows_with_next()``,
        ``batch.codes`` and ``batch.code_offsets[n_patients:]``.

        Other targets follow by ``PackedRows(values, batch).shift(-1)``, the next visit's value at
        every visit.

        Example:
            >>> from ehrseq_fast.batch import PackedVisits
            >>> targets = PackedVisits.from_lists([[[1]], [[2], [3, 4], []]]).next_visit_codes()
            >>> targets.rows, targets.codes  # after rows 0 (visit [2]) and 2 (visit [3, 4])
            (tensor([0, 2]), tensor([3, 4], dtype=torch.int32))
            >>> targets.offsets
            tensor([0, 2, 2], dtype=torch.int32)
        """
        self._codes_per_row()  # refuses offsets that fall
        begins = self.code_offsets[self.n_patients :]
        codes = self.codes[int(begins[0]) :].clone()
        return NextVisitCodes(self.rows_with_next(), codes, begins - begins[0])

    def _time_and_rank(self) -> tuple[Tensor, Tensor]:
        rows = torch.arange(self.n_visits, device=self.device)
        time = torch.searchsorted(self.row_starts[1:], rows, right=True)
        return time, rows - self.row_starts[time]
