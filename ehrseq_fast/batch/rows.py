"""The rows of a batch: whose visits they are, and padding and packing by them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..arrays import expect_tensor, integer
from .fill import check_fill
from .layout import MOST_CODES
from .storage import Storage


class Rows(Storage):
    """A batch's rows, one for each visit, as :class:`PackedVisits` orders them."""

    def rows_of(self, patient: int) -> Tensor:
        """int64 ``[length]``: the rows of one patient's visits, in time order.

        Raises:
            IndexError: if there is no such patient.

        Example:
            >>> from ehrseq_fast.batch import PackedVisits
            >>> PackedVisits.from_lists([[[1]], [[2], [3]]]).rows_of(1)
            tensor([0, 2])
        """
        if not -len(self) <= patient < len(self):
            raise IndexError(f"patient: expected a number in [0, {len(self)}), got {patient}")
        return self.row_starts[: int(self.lengths[patient])] + self.unsorted_indices[patient]

    @property
    def time_of_row(self) -> Tensor:
        """int64 ``[n_visits]``: which of its patient's visits each row is, from 0."""
        rows = torch.arange(self.n_visits, device=self.device)
        return torch.searchsorted(self.row_starts[1:], rows, right=True)

    @property
    def patient_of_row(self) -> Tensor:
        """int64 ``[n_visits]``: whose visit each row is, in the caller's numbers."""
        rows = torch.arange(self.n_visits, device=self.device)
        return self.sorted_indices[rows - self.row_starts[self.time_of_row]]

    @property
    def row_of_code(self) -> Tensor:
        """int64 ``[n_codes]``: the row of each code."""
        rows = torch.arange(self.n_visits, device=self.device)
        counts = self._codes_per_row()
        return torch.repeat_interleave(rows, counts, output_size=self.n_codes)

    def pad(self, values: Tensor, fill: float = 0, total_length: int | None = None) -> Tensor:
        """Rows ``[n_visits, ...]`` to ``[B, V, ...]`` in the caller's order; ``fill`` elsewhere.

        ``V`` is ``max_visits``, or ``total_length`` where that is given. Differentiable. The
        inverse is :meth:`pack`.

        Raises:
            ValueError: if ``values`` has not one row per visit, ``total_length`` is too small, or
                the dtype of ``values`` does not hold ``fill`` (0.5 or -1 in uint8).
            TypeError: if ``fill`` is no number, or a boolean for values that are not.

        Example:
            >>> import torch
            >>> from ehrseq_fast.batch import PackedVisits
            >>> batch = PackedVisits.from_lists([[[1]], [[2], [3]]])
            >>> batch.pad(torch.tensor([20.0, 10.0, 30.0]), fill=-1)
            tensor([[10., -1.],
                    [20., 30.]])
        """
        self._check_rows("values", values)
        check_fill(fill, values.dtype)
        n_visits = self._total_length(total_length)
        slots = self._slots_within(n_visits)
        padded = values.new_full((self.n_patients * n_visits, *values.shape[1:]), fill)
        return padded.index_copy(0, slots, values).unflatten(0, (self.n_patients, n_visits))

    def pack(self, padded: Tensor) -> Tensor:
        """Padded ``[B, V, ...]`` in the caller's order to rows ``[n_visits, ...]``; padding is not
        read. ``V`` may exceed ``max_visits``. Differentiable. The inverse is :meth:`pad`.

        Raises:
            ValueError: if ``padded`` has another number of patients, or too few visits.

        Example:
            >>> import torch
            >>> from ehrseq_fast.batch import PackedVisits
            >>> batch = PackedVisits.from_lists([[[1]], [[2], [3]]])
            >>> batch.pack(torch.tensor([[10.0, -1.0], [20.0, 30.0]]))
            tensor([20., 10., 30.])
        """
        expect_tensor("padded", padded)
        patients, longest = self.n_patients, self.max_visits
        if padded.dim() < 2 or padded.shape[0] != patients or padded.shape[1] < longest:
            raise ValueError(
                f"padded: expected shape [B={patients}, V>={longest}, ...], "
                f"got {list(padded.shape)}"
            )
        return padded.flatten(0, 1).index_select(0, self._slots_within(padded.shape[1]))

    def to_padded(self, total_length: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The padded triple, patients in the caller's order, codes in their order within the visit.

        On a GPU this waits for the device, for the number of codes of the largest visit.

        Returns:
            visit_codes int64 ``[B, V, C]`` (0 where padded), visit_mask bool ``[B, V, C]`` or, of
            a batch with weights of codes, these weights (0 where padded), sequence_mask bool
            ``[B, V]``; ``V`` is ``max_visits`` or ``total_length``, ``C`` the largest visit's
            number of codes.

        Raises:
            ValueError: if ``total_length`` is too small.

        Example:
            >>> from ehrseq_fast.batch import PackedVisits
            >>> visit_codes, visit_mask, sequence_mask = PackedVisits.from_lists(
            ...     [[[4]], [[1, 2], [3]]]
            ... ).to_padded()
            >>> visit_codes
            tensor([[[4, 0],
                     [0, 0]],
            <BLANKLINE>
                    [[1, 2],
                     [3, 0]]])
            >>> sequence_mask
            tensor([[ True, False],
                    [ True,  True]])
        """
        n_visits = self._total_length(total_length)
        counts = self._codes_per_row()
        n_slots = int(counts.max()) if self.n_codes else 0
        row_of_code = self.row_of_code
        place = torch.arange(self.n_codes, device=self.device) - self.code_offsets[row_of_code]
        slots = self._slots_within(n_visits)[row_of_code] * n_slots + place
        visit_codes = slots.new_zeros(self.n_patients, n_visits, n_slots)
        visit_codes.view(-1).index_copy_(0, slots, self.codes.long())
        if self.code_weights is None:
            visit_mask = torch.zeros_like(visit_codes, dtype=torch.bool)
            visit_mask.view(-1).index_fill_(0, slots, True)
        else:
            zeros = self.code_weights.new_zeros(visit_codes.numel())
            visit_mask = zeros.index_copy(0, slots, self.code_weights).view_as(visit_codes)
        return visit_codes, visit_mask, self.sequence_mask(n_visits)

    def sequence_mask(self, total_length: int | None = None) -> Tensor:
        """bool ``[B, V]``: which slots are visits, in the caller's order of patients; ``V`` is
        ``max_visits`` or ``total_length``.

        Raises:
            ValueError: if ``total_length`` is too small.

        Example:
            >>> from ehrseq_fast.batch import PackedVisits
            >>> PackedVisits.from_lists([[[1]], [[2], [3]]]).sequence_mask()
            tensor([[ True, False],
                    [ True,  True]])
        """
        rows = torch.ones(self.n_visits, dtype=torch.bool, device=self.device)
        return self.pad(rows, False, total_length)

    def as_packed_sequence(self, data: Tensor) -> PackedSequence:
        """Rows ``[n_visits, ...]`` as a ``PackedSequence``, without a copy.

        Raises:
            ValueError: if ``data`` has not one row per visit.

        Example:
            >>> import torch
            >>> from ehrseq_fast.batch import PackedVisits
            >>> batch = PackedVisits.from_lists([[[1]], [[2], [3]]])
            >>> lstm = torch.nn.LSTM(4, 5)
            >>> output, (h, c) = lstm(batch.as_packed_sequence(torch.ones(3, 4)))
            >>> output.data.shape, h.shape  # h in the caller's order
            (torch.Size([3, 5]), torch.Size([1, 2, 5]))
        """
        self._check_rows("data", data)
        return PackedSequence(data, self.batch_sizes, self.sorted_indices, self.unsorted_indices)

    def _codes_per_row(self) -> Tensor:
        counts = self.code_offsets.diff()
        if self.device.type != "cpu" or torch.compiler.is_compiling():
            return counts
        # a file may hold anything, and offsets written to through NumPy are not noticed
        fall = bool((counts < 0).any())
        ends = self.code_offsets[:1].tolist() + self.code_offsets[-1:].tolist()
        if fall or ends != [0, self.n_codes]:
            raise ValueError(
                f"code_offsets: expected offsets that rise from 0 to {self.n_codes}, got "
                f"{'falling ones' if fall else f'{ends[0]} to {ends[1]}'}"
            )
        return counts

    def _check_rows(self, name: str, values: Tensor) -> None:
        expect_tensor(name, values)
        if values.dim() < 1 or values.shape[0] != self.n_visits:
            raise ValueError(
                f"{name}: expected one row per visit, [n_visits={self.n_visits}, ...], "
                f"got {list(values.shape)}"
            )

    def _total_length(self, total_length: int | None) -> int:
        if total_length is None:
            return self.max_visits
        total_length = integer("total_length", total_length, 0, MOST_CODES)
        if total_length < self.max_visits:
            raise ValueError(
                f"total_length: expected at least max_visits={self.max_visits}, got {total_length}"
            )
        return total_length

    def _slots_within(self, n_visits: int) -> Tensor:
        """int64 ``[n_visits]``: patient * n_visits + time, each row's place among padded ones."""
        time = self.time_of_row
        rows = torch.arange(self.n_visits, device=self.device)
        return self.sorted_indices[rows - self.row_starts[time]] * n_visits + time
