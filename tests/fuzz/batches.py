"""Calls of the batch builder, of its compiled module directly, and of what takes batches that were
changed after they were built. The expected result is what the builder in NumPy says, errors word
for word."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ehrseq_fast import PackedVisits, packed_survival_nll, packed_visit_pool, use_backend
from ehrseq_fast.batch.builder import batch_builder

from .arguments import Call, Draw

BUILDERS: dict[str, Callable[[Draw], Call]] = {}


def builds(make: Callable[[Draw], Call]) -> Callable[[Draw], Call]:
    BUILDERS[make.__name__] = make
    return make


def contents(batch: PackedVisits) -> list[Any]:
    """All that a batch holds, to be compared."""
    held: list[Any] = [batch.codes, batch.code_offsets, batch.index_codes, batch.index_offsets]
    held += [batch.index_visits, batch.batch_sizes, batch.lengths, batch.sorted_indices]
    held += [batch.unsorted_indices, batch.row_starts, batch.last_rows]
    held += [getattr(batch, name) for name in ("event_times", "event_indicators", "event_types")]
    return [x.clone() for x in held if x is not None]


def in_both(build: Callable[..., PackedVisits], arguments: list[Any]) -> Call:
    """Built by the compiled builder, and expected as the NumPy implementation has it."""

    def run(*given: Any) -> list[Any]:
        return contents(build(*given))

    call = Call(run, arguments)

    def expected() -> list[Any]:
        with use_backend("reference"):
            return run(*call.arguments)

    call.expected = expected
    return call


def _records(draw: Draw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lengths = draw.random.integers(1, 5, draw.whole(0, 5))
    counts = draw.random.integers(0, 4, int(lengths.sum()))
    codes = draw.random.integers(0, 9, int(counts.sum()))
    visit_offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
    patient_offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
    return codes.astype(draw.one_of((np.int64, np.int32))), visit_offsets, patient_offsets


ODD = (-1, 2**31 - 1, 2**31, 2**40, -(2**63), 10, 0, True, 1.5, None, "1", [], float("nan"))


def _lists(draw: Draw) -> list[Any]:
    codes, visits, patients = _records(draw)
    nested: list[Any] = [
        [codes[visits[v] : visits[v + 1]].tolist() for v in range(patients[p], patients[p + 1])]
        for p in range(len(patients) - 1)
    ]
    if draw.chance(0.4) and nested:
        patient = draw.whole(0, len(nested) - 1)
        visit = draw.whole(0, len(nested[patient]) - 1)
        what = draw.whole(0, 3)
        if what == 0:
            nested[patient] = draw.one_of(([], (), 5, None, "ab", {1: 2}, [[]]))
        elif what == 1:
            nested[patient][visit] = draw.one_of((3, None, "ab", (1, 2), {4}, np.array([1, 2])))
        else:
            nested[patient][visit].append(draw.one_of((*ODD, 2**64, np.int8(3), np.float32(2))))
    return nested


def _outcome(draw: Draw, patients: int, highest: int) -> Any:
    if draw.chance(0.5):
        return None
    given = draw.random.integers(0, highest + 1, patients + draw.one_of((0, 0, 0, 0, 1, -1)) % 99)
    return given.astype(draw.one_of((np.int64, np.int32, np.float64, np.uint8, bool)))


@builds
def from_lists(draw: Draw) -> Call:
    nested = _lists(draw)
    vocabulary = draw.one_of((None, 9, 9, 3, 1, 2**31 - 1))
    times = _outcome(draw, len(nested), 0)
    seen = _outcome(draw, len(nested), 1)

    def build(patients: Any, vocab_size: Any, event_times: Any, indicators: Any) -> PackedVisits:
        return PackedVisits.from_lists(
            patients, vocab_size=vocab_size, event_times=event_times, event_indicators=indicators
        )

    return in_both(build, [nested, vocabulary, times, seen])


def _array_changed(draw: Draw, array: np.ndarray) -> np.ndarray:  # noqa: PLR0911
    what = draw.whole(0, 9)
    if array.dtype.kind not in "iu":  # changed before, to what no file holds
        return array
    if what == 0 and array.size:
        changed = array.copy()
        limits = np.iinfo(array.dtype)
        wrong = draw.one_of((-1, 0, 1, 5, 1000, 2**31 - 1, 2**31, 2**62, -(2**63), 2**63 - 1))
        changed.flat[draw.whole(0, array.size - 1)] = min(max(wrong, limits.min), limits.max)
        return changed
    if what == 1:
        return array[::-1]
    if what == 2:
        return np.repeat(array, 2)[::2]
    if what == 3:
        return array[: draw.whole(0, array.size)]
    if what == 4:
        integers = (np.int8, np.int16, np.uint8, np.uint16, np.uint32, np.uint64)
        return array.astype(draw.one_of((*integers, np.float64, object, np.bool_)))
    if what == 5:
        return array[None]
    if what == 6 and array.size:
        return np.broadcast_to(array[:1], array.shape)
    if what == 7:
        return np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(array.dtype)
    if what == 8:
        return array.astype(array.dtype.newbyteorder())
    return array[::-1][np.argsort(draw.random.random(len(array)))]


def _flat(draw: Draw) -> list[Any]:
    arrays: list[Any] = list(_records(draw))
    for _ in range(draw.one_of((0, 0, 1, 1, 2))):
        at = draw.whole(0, 2)
        arrays[at] = _array_changed(draw, arrays[at])
    patients = np.size(arrays[2]) - 1
    chosen = None
    if draw.chance(0.5):
        chosen = draw.random.integers(0, max(patients, 1), draw.whole(0, 6))
        if draw.chance(0.3):
            chosen = _array_changed(draw, chosen)
    return [*arrays, chosen]


@builds
def from_flat(draw: Draw) -> Call:
    arguments = _flat(draw)
    vocabulary = draw.one_of((None, 9, 9, 3))
    times = _outcome(draw, max(np.size(arguments[2]) - 1, 0), 0)

    def build(codes: Any, visits: Any, patients: Any, chosen: Any, *rest: Any) -> PackedVisits:
        return PackedVisits.from_flat(
            codes, visits, patients, chosen, vocab_size=rest[0], event_times=rest[1]
        )

    return in_both(build, [*arguments, vocabulary, times])


@builds
def from_truncated_file(draw: Draw) -> Call:
    """Codes and offsets in files that were cut short before they were mapped."""
    arrays = _records(draw)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    cut = draw.whole(0, 2)
    shares = draw.random.random()

    def mapped(at: int) -> np.ndarray:
        path = folder / f"{at}.bin"
        data = arrays[at].tobytes()
        path.write_bytes(data[: int(len(data) * shares)] if at == cut else data)
        return np.memmap(path, arrays[at].dtype, mode="r")

    def build() -> PackedVisits:
        return PackedVisits.from_flat(mapped(0), mapped(1), mapped(2))

    return in_both(build, [])


@builds
def from_padded(draw: Draw) -> Call:
    shape = [draw.whole(0, 4) for _ in range(3)]
    codes = draw.integers(0, 9, shape, draw.one_of((torch.int64, torch.int32)))
    if draw.chance(0.3) and codes.numel():
        codes.view(-1)[draw.whole(0, codes.numel() - 1)] = draw.one_of((-1, 9, 2**31 - 1))
    mask = draw.mask(shape)
    lengths = draw.integers(1 if draw.chance(0.9) else 0, shape[1] + 1, shape[:1])
    visits = torch.arange(shape[1]) < lengths[:, None]
    visit_mask = None if draw.chance(0.2) else visits.to(draw.one_of((torch.bool, torch.float32)))
    for given in (mask, visit_mask):
        if given is not None and given.numel() and draw.chance(0.3):
            at = draw.whole(0, given.numel() - 1)
            if given.dtype == torch.bool:
                given.view(torch.uint8).view(-1)[at] = draw.whole(0, 255)
            else:
                given.view(-1)[at] = draw.one_of((0, 1, 2))
    if draw.chance(0.2) and codes.dim() == 3:
        codes = codes.transpose(0, 1).contiguous().transpose(0, 1)
    if draw.chance(0.1):
        codes = codes.flatten(draw.whole(0, 1), 2)
    told = None if draw.chance(0.6) else lengths.numpy()

    def build(*given: Any) -> PackedVisits:
        return PackedVisits.from_padded(*given[:4], vocab_size=given[4])

    return in_both(build, [codes, mask, visit_mask, told, draw.one_of((None, 9))])


def _states(draw: Draw, shape: list[int]) -> np.ndarray | None:
    if draw.chance(0.3):
        return None
    if shape and draw.chance(0.3):
        shape = [*shape[:-1], 1]
    return np.asarray(draw.random.integers(0, 4, shape), np.uint8)


@builds
def compiled_module(draw: Draw) -> Call:
    """The compiled builder without the checks of the public face."""
    module = batch_builder()
    codes, visits, patients, chosen = _flat(draw)
    outcomes = [_outcome(draw, draw.whole(0, 5), 1) for _ in range(3)]
    vocabulary = draw.one_of((9, 3, 2**31 - 1, 0, -1, 2**62))
    what = draw.whole(0, 2)
    if what == 0:
        arguments = [codes, visits, patients, chosen, vocabulary, *outcomes, draw.chance(0.5)]
        return Call(module.pack_flat, arguments, values_kept=False)
    if what == 1:
        arguments = [_lists(draw), vocabulary, *outcomes, draw.chance(0.5)]
        return Call(module.pack_lists, arguments, values_kept=False)
    shape = [draw.whole(0, 3) for _ in range(draw.one_of((3, 3, 3, 2, 1, 0)))]
    padded = np.asarray(draw.random.integers(0, 9, shape))
    states = [_states(draw, shape[:n]) for n in (3, 2)]
    lengths = None if draw.chance(0.5) else draw.random.integers(0, 4, draw.whole(0, 4))
    return Call(
        module.pack_padded, [padded, *states, lengths, vocabulary, *outcomes], values_kept=False
    )


@builds
def changed_batch(draw: Draw) -> Call:
    """A batch of which something was overwritten, by torch or behind its back by NumPy."""
    codes, visits, patients = _records(draw)
    n = len(patients) - 1
    batch = PackedVisits.from_flat(
        codes,
        visits,
        patients,
        event_times=np.zeros(n, np.int64),
        event_indicators=np.ones(n, np.int64),
    )
    names = ("codes", "code_offsets", "index_codes", "index_offsets", "index_visits")
    names += ("batch_sizes", "lengths", "unsorted_indices", "row_starts", "last_rows")
    name = draw.one_of(names)
    given: Tensor = getattr(batch, name)
    if given.numel():
        at = draw.whole(0, given.numel() - 1)
        value = draw.one_of((-1, 0, 1, 5, 1000, 2**31 - 1, -(2**31)))
        if draw.chance(0.5):
            given.view(-1)[at] = value
        else:
            given.numpy().reshape(-1)[at] = value
    mode = draw.one_of(("mean", "sum", "max", "attention"))
    table = torch.ones(9, 3, requires_grad=True)

    def run() -> None:
        scores = torch.ones(9) if mode == "attention" else None
        pooled = packed_visit_pool(batch, table, mode=mode, scores=scores)
        pooled.sum().backward()
        lstm = torch.nn.LSTM(3, 4)
        from ehrseq_fast import packed_lstm

        packed_lstm(batch.as_packed_sequence(pooled.detach()), lstm.all_weights)
        hazards = torch.full((batch.n_visits,), 0.5, requires_grad=True)
        packed_survival_nll(hazards, batch).backward()
        batch.pad(hazards.detach())
        batch.to_padded()
        if len(batch):
            contents(batch[[0]])

    return Call(run, [], values_kept=False)
