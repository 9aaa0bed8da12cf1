"""One batch of patients with nothing padded: :class:`PackedVisits`.

It is built on the host, in a data-loader worker if there is one, and holds every length that a
kernel could ask for, so that no step of a model has to ask the device. The building itself is
``csrc/batching`` (or its NumPy counterpart ``reference.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from ..arrays import ArrayLike, kind_of
from ..autograd import outside_transforms
from . import builder
from .checks import resolve_index
from .join import check_alike, join
from .sources import Sources


class PackedVisits(Sources):
    """A batch of patients' visits with nothing padded, in ``PackedSequence`` order.

    Visits are rows, time-major: the first visits of all patients (those with the most visits first;
    ties keep the caller's order), then the second visits of all who have one, and so on. Whatever
    is per patient stays in the caller's order. Build one with :meth:`from_lists`,
    :meth:`from_flat` or :meth:`from_padded`; of a data frame, of objects or of nested ragged arrays
    with :meth:`from_frame`, :meth:`from_objects` or :meth:`from_nested_ragged`.

    A batch is immutable: its fields belong together, so they can neither be assigned nor written
    to. A change in place of codes, offsets, index, lengths or outcomes is noticed, and refused with
    ``RuntimeError``, when the batch is next used, unless it is made through ``.numpy()`` or
    ``.data``. One of ``visit_features``, ``code_weights`` or a tensor in ``targets`` or
    ``visit_targets`` is not noticed, and changes every batch that holds the tensor. Whatever a
    batch is made from is copied: writing to it later changes no batch. :meth:`with_outcomes`,
    :meth:`with_codes`, :meth:`with_features` and :meth:`with_code_weights` make changed copies.
    ``copy.deepcopy``, ``pickle``, slices, :meth:`cat`, :meth:`pin_memory` and :meth:`to` keep
    outcomes, features, weights and targets.

    ``torch.export`` takes no batch as an input, but its tensors, whose sizes it keeps dynamic:
    :func:`ehrseq_fast.exporting.export_model`.

    Attributes:
        codes: int32 ``[n_codes]``, the codes of row 0, then of row 1, ...; within a visit in the
            caller's order.
        code_offsets: int32 ``[n_visits + 1]``; row ``r`` holds
            ``codes[code_offsets[r]:code_offsets[r + 1]]``, possibly nothing.
        index_codes: int32 ``[n_distinct]``, the distinct codes, ascending.
        index_offsets: int32 ``[n_distinct + 1]``.
        index_visits: int32 ``[n_codes]``; the rows that hold ``index_codes[k]``, ascending, once
            for each time they hold it: ``index_visits[index_offsets[k]:index_offsets[k + 1]]``.
        batch_sizes: int64 ``[max_visits]``, always on the CPU: patients that have a visit ``t``.
        lengths: int64 ``[n_patients]``, always on the CPU: visits of each patient.
        sorted_indices, unsorted_indices: int64 ``[n_patients]``: the patient at each rank, the rank
            of each patient; as in ``PackedSequence``.
        row_starts: int64 ``[max_visits + 1]``; visit ``t`` of the patient at rank ``r`` is row
            ``row_starts[t] + r``.
        last_rows: int64 ``[n_patients]``, the row of each patient's last visit.
        event_times: int64 ``[n_patients]``, visit of the event or the censoring, from 0, or None.
        event_indicators: int64 ``[n_patients]``, 1 where the event was seen, 0 censored, or None.
        event_types: int64 ``[n_patients]``, 0 censored, 1.. which of competing events, or None.
        visit_features: ``[n_visits, F]``, floating, in row order, or None.
        code_weights: ``[n_codes]``, floating, in the order of ``codes``, or None: what each code
            counts for (a dose, a lab value, TF-IDF, a decay over time) where the codes of a visit
            are pooled by mean or sum; see :func:`~ehrseq_fast.packed_visit_pool`.
        targets: tensors ``[n_patients, ...]`` by name, in a read-only mapping.
        visit_targets: tensors ``[n_visits, ...]`` in row order, by name.
        vocab_size: the range that the codes were checked against, or None.

    Example:
        >>> from ehrseq_fast.batch import PackedVisits
        >>> batch = PackedVisits.from_lists([[[5, 2]], [[1], [2, 2], []]], vocab_size=6)
        >>> batch
        PackedVisits(patients=2, visits=4, codes=5, distinct_codes=3, max_visits=3, device=cpu)
        >>> batch.batch_sizes  # both patients have a first visit; the second patient has two more
        tensor([2, 1, 1])
        >>> batch.codes, batch.code_offsets
        (tensor([1, 5, 2, 2, 2], dtype=torch.int32), tensor([0, 1, 3, 5, 5], dtype=torch.int32))
        >>> batch.index_codes, batch.index_visits  # code 2: once in row 1, twice in row 2
        (tensor([1, 2, 5], dtype=torch.int32), tensor([0, 1, 2, 2, 1], dtype=torch.int32))
    """

    @classmethod
    def from_lists(
        cls,
        patients: Sequence[Sequence[Sequence[int]]],
        *,
        vocab_size: int | None = None,
        event_times: ArrayLike | None = None,
        event_indicators: ArrayLike | None = None,
        event_types: ArrayLike | None = None,
        visit_features: ArrayLike | Sequence[ArrayLike] | None = None,
        targets: Mapping[str, ArrayLike] | None = None,
        visit_targets: Mapping[str, ArrayLike | Sequence[ArrayLike]] | None = None,
        code_weights: ArrayLike | Sequence[Sequence[ArrayLike]] | None = None,
    ) -> PackedVisits:
        """Pack nested sequences: patients -> visits -> code ids.

        Args:
            patients: each patient at least one visit; a visit may be empty. Lists and tuples of
                Python integers are the fast case; any iterables of integers work.
            vocab_size: codes must be below it.
            event_times, event_indicators, event_types: one integer per patient.
            visit_features: floats, ``[V_i, F]`` per patient in a list, or ``[all visits, F]`` with
                the patients one after the other.
            targets: ``[n_patients, ...]`` by name.
            visit_targets: like ``visit_features``, of any dtype and shape ``[..., ...]``, by name.
            code_weights: floats, one per code: nested as ``patients`` are, or flat, all codes of
                patient 0, then of patient 1, ... See :attr:`code_weights`.

        Raises:
            ValueError: a patient without visits, an event time outside a patient's visits, an event
                indicator that is neither 0 nor 1, a wrong shape.
            IndexError: a code below 0 or not below ``vocab_size``.
            TypeError: something that is not a sequence, or not an integer.

        Example:
            >>> from ehrseq_fast.batch import PackedVisits
            >>> batch = PackedVisits.from_lists(
            ...     [[[3]], [[1, 2], [2]]], event_times=[0, 1], event_indicators=[0, 1]
            ... )
            >>> batch.codes.tolist(), batch.code_offsets.tolist()
            ([1, 2, 3, 2], [0, 2, 3, 4])
            >>> batch.event_times  # the caller's order
            tensor([0, 1])
            >>> PackedVisits.from_lists([[[3]], []])  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ...
            ValueError: Found 1 sequences with zero length. ... The first is patient 1.
        """
        outcomes = (event_times, event_indicators, event_types)
        return cls(
            *builder.from_lists(
                patients,
                vocab_size,
                outcomes,
                visit_features,
                targets,
                visit_targets,
                code_weights,
            )
        )

    @classmethod
    def from_flat(
        cls,
        codes: ArrayLike,
        visit_offsets: ArrayLike,
        patient_offsets: ArrayLike,
        patients: ArrayLike | None = None,
        *,
        vocab_size: int | None = None,
        event_times: ArrayLike | None = None,
        event_indicators: ArrayLike | None = None,
        event_types: ArrayLike | None = None,
        visit_features: ArrayLike | None = None,
        targets: Mapping[str, ArrayLike] | None = None,
        visit_targets: Mapping[str, ArrayLike] | None = None,
        code_weights: ArrayLike | None = None,
    ) -> PackedVisits:
        """Pack the chosen patients of a whole data set in flat arrays.

        This is what a data-loader worker calls. The arrays may be memory-mapped and of any stride:
        only the rows of the chosen patients are read (and checked), and the GIL is released
        meanwhile.

        Args:
            codes: integers ``[all codes]`` of any width, with a sign or without.
            visit_offsets: int32 or int64 ``[all visits + 1]``; visit ``v`` holds
                ``codes[visit_offsets[v]:visit_offsets[v + 1]]``.
            patient_offsets: int32 or int64 ``[all patients + 1]``; the visits of patient ``p`` are
                ``patient_offsets[p]`` to ``patient_offsets[p + 1]``.
            patients: which patients, in the batch's order, repetitions allowed; all without it.
            vocab_size: codes must be below it.
            event_times, event_indicators, event_types: ``[all patients]``.
            visit_features: floats ``[all visits, F]``.
            targets: ``[all patients, ...]`` by name.
            visit_targets: ``[all visits, ...]`` by name.
            code_weights: floats ``[all codes]``. See :attr:`code_weights`.

        Raises:
            ValueError: as :meth:`from_lists`, and offsets that fall, point outside, do not begin
                with 0 or do not end with the number of codes, or of visits.
            IndexError: a code outside the vocabulary, or a patient number outside the data set.
            TypeError: a dtype other than those above.

        Example:
            >>> import numpy as np
            >>> from ehrseq_fast.batch import PackedVisits
            >>> codes = np.array([7, 1, 2, 2, 9])
            >>> visit_offsets = np.array([0, 1, 3, 4, 5])  # visits [7], [1, 2], [2], [9]
            >>> patient_offsets = np.array([0, 1, 3, 4])  # three patients
            >>> batch = PackedVisits.from_flat(codes, visit_offsets, patient_offsets, [2, 1])
            >>> batch.lengths, batch.codes
            (tensor([1, 2]), tensor([1, 2, 9, 2], dtype=torch.int32))
        """
        return cls(
            *builder.from_flat(
                codes,
                visit_offsets,
                patient_offsets,
                patients,
                vocab_size,
                (event_times, event_indicators, event_types),
                visit_features,
                targets,
                visit_targets,
                code_weights,
            )
        )

    @classmethod
    def from_padded(
        cls,
        visit_codes: Tensor,
        visit_mask: Tensor | None = None,
        sequence_mask: Tensor | None = None,
        lengths: ArrayLike | None = None,
        *,
        vocab_size: int | None = None,
        event_times: ArrayLike | None = None,
        event_indicators: ArrayLike | None = None,
        event_types: ArrayLike | None = None,
        visit_features: Tensor | None = None,
        targets: Mapping[str, ArrayLike] | None = None,
        visit_targets: Mapping[str, Tensor] | None = None,
        side: str = "right",
        holes: str = "refuse",
        code_weights: ArrayLike | None = None,
    ) -> PackedVisits:
        """Pack the padded triple of tensors. Padding is not read: it may hold any code.

        On a GPU the host waits for the device **exactly once**, for the sizes of what comes out:
        the number of real codes and of distinct ones, the lengths where they are not given, and the
        count of errors, all in one small copy. With ``lengths`` given there is still this one wait,
        as the number of real codes is known nowhere else, but visits past the longest patient's
        last are skipped. (A batch built in a data-loader worker needs no wait at all.)

        Args:
            visit_codes: integers ``[B, V, C]`` of any width.
            visit_mask: ``[B, V, C]``, bool or numeric 0/1: which codes are real; without it all. A
                floating mask with other values than 0 and 1 weighs codes, as in
                :func:`~ehrseq_fast.visit_mean_pool`, and becomes :attr:`code_weights`; on a GPU
                such a batch is built on the host.
            sequence_mask: ``[B, V]``, bool or numeric 0/1, ones first (see ``side``): which visits
                are real; without it and without ``lengths`` all are.
            lengths: integers ``[B]`` on the host, instead of ``sequence_mask`` or beside it. Beside
                it, the two are compared on the CPU; on a GPU ``lengths`` are believed.
            vocab_size: codes must be below it.
            event_times, event_indicators, event_types: integers ``[B]``.
            visit_features: floating ``[B, V, F]``; gradients flow back to it.
            targets: ``[B, ...]`` by name.
            visit_targets: ``[B, V, ...]`` by name.
            side: where the padding visits are: ``"right"`` of the real ones, or ``"left"``.
            holes: what to do with padding between real visits: ``"refuse"`` it, or ``"pack"`` the
                real visits in their order, wherever the padding is.
            code_weights: floats ``[B, V, C]``, read where ``visit_mask`` is not zero; gradients
                flow back to them. See :attr:`code_weights`.

        Event times, and the visits that errors name, are counted among a patient's real visits.

        Raises:
            ValueError: as :meth:`from_lists`; a mask of integers, or one beside ``code_weights``,
                that is neither 0 nor 1 on a real visit, a NaN in a mask, a ``sequence_mask`` with
                holes or with its padding on the other side, lengths that disagree with it, lengths
                on a GPU, tensors on different devices.
            IndexError: a code outside the vocabulary.
            TypeError: codes that are no integers.

        Example:
            >>> import torch
            >>> from ehrseq_fast.batch import PackedVisits
            >>> visit_codes = torch.tensor([[[4, 0], [-9, 0]], [[1, 2], [3, 0]]])
            >>> batch = PackedVisits.from_padded(
            ...     visit_codes, visit_codes > 0, torch.tensor([[1, 0], [1, 1]])
            ... )
            >>> batch.codes, batch.lengths
            (tensor([1, 2, 4, 3], dtype=torch.int32), tensor([1, 2]))
            >>> PackedVisits.from_padded(
            ...     visit_codes, visit_codes > 0, torch.tensor([[0, 1], [1, 1]]), side="left"
            ... ).codes
            tensor([1, 2, 3], dtype=torch.int32)
        """
        with outside_transforms():
            contents = builder.from_padded(
                visit_codes,
                visit_mask,
                sequence_mask,
                lengths,
                vocab_size,
                (event_times, event_indicators, event_types),
                visit_features,
                targets,
                visit_targets,
                side,
                holes,
                code_weights,
            )
        return cls(*contents)

    @classmethod
    def cat(cls, batches: Iterable[PackedVisits]) -> PackedVisits:
        """One batch of all the batches' patients, in that order.

        The batches must agree in what they hold: outcomes, features, weights, names of targets.
        The result lies where the first one lies; a batch on a GPU is brought to the host and back,
        which waits for the device.

        Raises:
            ValueError: no batches, or batches that hold different things.
            TypeError: something else than batches.

        Example:
            >>> from ehrseq_fast.batch import PackedVisits
            >>> one, two = PackedVisits.from_lists([[[1]]]), PackedVisits.from_lists([[[2], [3]]])
            >>> PackedVisits.cat([one, two]).codes
            tensor([2, 1, 3], dtype=torch.int32)
        """
        batches = tuple(batches)  # an iterator can be read once
        for at, batch in enumerate(batches):
            if not isinstance(batch, PackedVisits):
                raise TypeError(f"batches: expected PackedVisits, got {kind_of(batch)}, at {at}")
        if not batches:
            raise ValueError("PackedVisits.cat expects at least one batch, got none")
        check_alike(batches)
        with outside_transforms():
            return cls(*join(batches, [np.arange(len(batch)) for batch in batches]))

    def __getitem__(self, patients: int | slice | ArrayLike) -> PackedVisits:
        """The batch of some of the patients: an integer, a slice, or a list, array or tensor of
        integers (negative ones count from the end) or of ``len(batch)`` booleans.

        A batch on a GPU is copied to the host and back, which waits for the device.

        Raises:
            IndexError: a patient number outside the batch.
            TypeError: an index of another type.

        Example:
            >>> from ehrseq_fast.batch import PackedVisits
            >>> batch = PackedVisits.from_lists([[[1]], [[2], [3]], [[4]]])
            >>> batch[1:].codes, batch[[2, 0]].codes
            (tensor([2, 4, 3], dtype=torch.int32), tensor([4, 1], dtype=torch.int32))
        """
        with outside_transforms():
            return type(self)(*join([self], [resolve_index(patients, len(self))]))
