"""Batches from data frames, from objects and from nested ragged arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from ..arrays import Array, ArrayLike, kind_of, longs
from . import builder
from .checks import listed
from .records import records_of, refuse_another_order
from .windows import Windows

Batch = TypeVar("Batch", bound="Sources")
Of = Callable[[Any], Any]


class Sources(Windows):
    """Constructors for what records come in; each ends in those of lists or flat arrays."""

    @classmethod
    def from_frame(
        cls: type[Batch],
        frame: Any,
        person: str = "person_id",
        time: str = "time",
        code: str = "code",
        value: str | None = None,
        *,
        persons: Iterable[Any] | None = None,
        vocabulary: Mapping[Any, int] | None = None,
        unknown: int | None = None,
        vocab_size: int | None = None,
        event_times: ArrayLike | None = None,
        event_indicators: ArrayLike | None = None,
        event_types: ArrayLike | None = None,
        targets: Mapping[str, ArrayLike] | None = None,
    ) -> Batch:
        """Pack a table with a row for each code: who, when, what.

        Rows of one person and one time are one visit. They may come in any order: visits go by
        time, the codes of a visit by row. A code that a visit has twice is there twice.

        Args:
            frame: a data frame of pandas, Polars, Arrow or another library that has
                ``__dataframe__``, or ``__arrow_c_stream__`` (Polars 2), which needs pyarrow; or a
                mapping of names to arrays. Other columns are not read.
            person: the column of persons: integers or text (categories too).
            time: the column of times: timestamps, dates or numbers.
            code: the column of codes: integers, or with ``vocabulary`` text.
            value: the column of the codes' weights (lab values, doses, counts), which become
                ``code_weights``: numbers, without nulls (a code that has no value may have 1).
            persons: ids, the batch's patients in that order (repetitions allowed); without them all
                persons in the order of their first rows, which with outcomes or targets has to be
                that of the ids too.
            vocabulary: the number of each code.
            unknown: the number of codes that the vocabulary does not have; None refuses them.
            vocab_size: numbers must be below it.
            event_times, event_indicators, event_types, targets: as in :meth:`from_lists`, in the
                order of the batch's patients, by position: a pandas ``Series`` whose index has the
                persons in another order is refused.

        Raises:
            ValueError: a column that is missing or has nulls (with the first row), an id without a
                row, outcomes whose order is not clear or another; as :meth:`from_lists`.
            IndexError: a code that is not in the vocabulary, with its row; as :meth:`from_lists`.
            TypeError: something that is no frame, columns of other kinds.

        Example:
            >>> from ehrseq_fast import PackedVisits
            >>> rows = {
            ...     "person_id": ["ann", "bob", "ann", "ann"],
            ...     "time": [2, 7, 1, 2],
            ...     "code": ["I10", "E11", "J45", "E11"],
            ... }
            >>> batch = PackedVisits.from_frame(rows, vocabulary={"E11": 1, "I10": 2, "J45": 3})
            >>> batch.lengths, batch.codes  # ann: [J45], [I10, E11]; bob: [E11]
            (tensor([2, 1]), tensor([3, 1, 2, 1], dtype=torch.int32))
        """
        outcomes = (event_times, event_indicators, event_types, targets)
        has_outcomes = any(given is not None for given in outcomes)
        columns = (person, time, code)
        flat = records_of(frame, columns, value, persons, vocabulary, unknown, has_outcomes)
        contents = builder.from_flat(
            flat.codes,
            flat.visit_offsets,
            flat.patient_offsets,
            flat.chosen,
            vocab_size,
            (None, None, None),
            None,
            None,
            None,
            flat.values,
        )
        named = {
            "event_times": event_times,
            "event_indicators": event_indicators,
            "event_types": event_types,
            **(targets if isinstance(targets, Mapping) else {}),
        }
        for name, values in named.items():
            refuse_another_order(name, values, flat.persons)
        return cls(*contents).with_outcomes(
            event_times=event_times,
            event_indicators=event_indicators,
            event_types=event_types,
            targets=targets,
        )

    @classmethod
    def from_objects(
        cls: type[Batch],
        objects: Iterable[Any],
        codes: Of,
        *,
        vocab_size: int | None = None,
        event_times: Of | ArrayLike | None = None,
        event_indicators: Of | ArrayLike | None = None,
        event_types: Of | ArrayLike | None = None,
        visit_features: Of | ArrayLike | Sequence[ArrayLike] | None = None,
        targets: Mapping[str, Of | ArrayLike] | None = None,
        visit_targets: Mapping[str, Of | ArrayLike | Sequence[ArrayLike]] | None = None,
        code_weights: Of | ArrayLike | None = None,
    ) -> Batch:
        """Pack patients that are objects of yours, by functions that say what each of them has.

        Args:
            objects: the patients.
            codes: of a patient, its visits' codes: ``lambda patient: [v.codes for v in
                patient.visits]``.
            event_times, event_indicators, event_types, visit_features: of a patient (a number; or
                an array ``[V, F]``), or all of them as in :meth:`from_lists`.
            targets, visit_targets: such functions, or arrays, by name.
            code_weights: of a patient, the weights of its visits' codes, or all of them.
            vocab_size: codes must be below it.

        Raises:
            ValueError, IndexError, TypeError: as :meth:`from_lists`.

        Example:
            >>> from ehrseq_fast import PackedVisits
            >>> patients = [{"visits": ["12", "3"], "dead": 1}, {"visits": ["4"], "dead": 0}]
            >>> batch = PackedVisits.from_objects(
            ...     patients,
            ...     lambda patient: [map(int, visit) for visit in patient["visits"]],
            ...     event_times=lambda patient: len(patient["visits"]) - 1,
            ...     event_indicators=lambda patient: patient["dead"],
            ... )
            >>> batch.codes, batch.event_times
            (tensor([1, 2, 4, 3], dtype=torch.int32), tensor([1, 0]))
        """
        patients = listed(objects)
        if not callable(codes):
            raise TypeError(f"codes: expected a function of a patient, got {kind_of(codes)}")

        def each(given: Any) -> Any:
            return [given(patient) for patient in patients] if callable(given) else given

        def by_name(given: Any) -> Any:
            if not isinstance(given, Mapping):
                return given
            return {name: each(values) for name, values in given.items()}

        contents = builder.from_lists(
            each(codes),
            vocab_size,
            (each(event_times), each(event_indicators), each(event_types)),
            each(visit_features),
            by_name(targets),
            by_name(visit_targets),
            each(code_weights),
        )
        return cls(*contents)

    @classmethod
    def from_nested_ragged(
        cls: type[Batch],
        tensors: Any,
        code: str = "code",
        *,
        patients: ArrayLike | None = None,
        vocab_size: int | None = None,
        event_times: ArrayLike | None = None,
        event_indicators: ArrayLike | None = None,
        event_types: ArrayLike | None = None,
        targets: Iterable[str] = (),
        visit_targets: Iterable[str] = (),
        code_weights: str | None = None,
    ) -> Batch:
        """Pack arrays in the layout of the ``nested_ragged_tensors`` package: codes
        ``"dim2/<code>"`` of all visits end to end, ``"dim2/bounds"`` where each visit's end, and
        ``"dim1/bounds"`` where each patient's visits end; or, one level less, one patient.

        Args:
            tensors: the mapping, or a ``JointNestedRaggedTensorDict``, which holds it as
                ``tensors``.
            code: the name of the codes.
            patients: which patients, as in :meth:`from_flat`.
            event_times, event_indicators, event_types: of all patients, as in :meth:`from_flat`.
            targets: names of arrays with a value for each patient, which the batch's targets are to
                hold.
            visit_targets: names of arrays with a value for each visit.
            code_weights: the name of an array with a weight for each code (of values, say).
            vocab_size: codes must be below it.

        Raises:
            ValueError: arrays that are missing or do not fit together; as :meth:`from_flat`.
            IndexError, TypeError: as :meth:`from_flat`.

        Example:
            >>> import numpy as np
            >>> from ehrseq_fast import PackedVisits
            >>> tensors = {
            ...     "dim1/bounds": np.array([1, 3]),  # one visit, two visits
            ...     "dim1/days": np.array([0.0, 0.0, 30.0]),
            ...     "dim2/bounds": np.array([1, 3, 4]),
            ...     "dim2/code": np.array([7, 1, 2, 9]),
            ... }
            >>> batch = PackedVisits.from_nested_ragged(tensors, visit_targets=["days"])
            >>> batch.codes, batch.visit_targets["days"]
            (tensor([1, 2, 7, 9], dtype=torch.int32), tensor([ 0.,  0., 30.], dtype=torch.float64))
        """
        arrays = getattr(tensors, "tensors", tensors)
        if not isinstance(arrays, Mapping):
            raise TypeError(
                "tensors: expected a mapping such as {'dim1/bounds': ..., 'dim2/bounds': ..., "
                f"'dim2/{code}': ...}}, got {kind_of(tensors)}"
            )
        level = next((level for level in (2, 1) if f"dim{level}/{code}" in arrays), None)
        if level is None:
            raise ValueError(
                f"tensors: expected 'dim2/{code}' (or, of one patient, 'dim1/{code}'), got "
                f"{sorted(map(str, arrays))}"
            )
        visit_offsets = _offsets_of(arrays, level)
        visits = len(visit_offsets) - 1
        patient_offsets = _offsets_of(arrays, 1) if level == 2 else np.array([0, visits])
        contents = builder.from_flat(
            arrays[f"dim{level}/{code}"],
            visit_offsets,
            patient_offsets,
            patients,
            vocab_size,
            (event_times, event_indicators, event_types),
            None,
            {name: _named(arrays, level - 2, name) for name in targets},
            {name: _named(arrays, level - 1, name) for name in visit_targets},
            None if code_weights is None else _named(arrays, level, code_weights),
        )
        return cls(*contents)


def _offsets_of(arrays: Mapping[str, Any], level: int) -> Array:
    ends = longs(f"dim{level}/bounds", _named(arrays, level, "bounds"))
    return np.concatenate([[0], ends])


def _named(arrays: Mapping[str, Any], level: int, name: str) -> Any:
    key = f"dim{level}/{name}"
    if key not in arrays:
        raise ValueError(f"tensors: expected {key!r}, got {sorted(map(str, arrays))}")
    return arrays[key]
