"""The raw survival operators, which export and torch.compile reach: whatever they index by is
checked, on every backend; always an error, never a crash or uninitialised memory."""

from __future__ import annotations

import math

import pytest
import torch

from ehrseq_fast import backend as backends

from .batches import from_lists

pytestmark = pytest.mark.operation("survival_nll")

PATIENTS = torch.tensor([2, 0, 1])
TYPES = torch.tensor([1, 0, 1])
PADDED = {
    "hazards": torch.rand(3, 4),
    "event_times": PATIENTS,
    "event_indicators": TYPES,
    "sequence_mask": torch.ones(3, 4, dtype=torch.bool),
    "entry_times": torch.zeros(3, dtype=torch.long),
    "sample_weight": torch.ones(3),
    "link": 0,
    "censored_included": False,
    "eps": 1e-7,
    "reduction": 1,
    "needs_grad": True,
}
LONG = torch.zeros(9, dtype=torch.long)
OF_PATIENTS = {
    "event_times": [
        LONG, LONG[:2], LONG[:0], LONG[0], LONG[:3, None], torch.zeros(3), torch.ones(3).bool(),
        torch.zeros(3, dtype=torch.cfloat), torch.zeros(3, dtype=torch.uint64),
    ],
    "entry_times": [LONG, LONG[:2], LONG[0], LONG[:3, None], torch.zeros(3), torch.ones(3).bool()],
    "sample_weight": [LONG, LONG[0], torch.ones(3, 4), torch.ones(3, dtype=torch.cfloat)],
    "link": [-1, 4, 7, 2**40],
    "reduction": [-1, 3, 7],
    "eps": [-1e-9, 0.5, math.nan, math.inf],
}  # fmt: skip
BAD_PADDED = OF_PATIENTS | {
    "hazards": [
        torch.rand(3), torch.rand(()), torch.rand(3, 4, 1, 1), torch.rand(2, 4), torch.rand(4, 4),
        torch.rand(3, 5), torch.ones(3, 4).long(), torch.ones(3, 4, dtype=torch.cfloat),
    ],
    "event_indicators": [LONG, LONG[0], LONG[:3, None], torch.ones(3, dtype=torch.cfloat)],
    "sequence_mask": [
        torch.ones(3, 5), torch.ones(3, 3), torch.ones(2, 4), torch.ones(12), torch.ones(()),
        torch.ones(3, 4, 1), torch.ones(3, 4, dtype=torch.cfloat),
    ],
}  # fmt: skip


def namespace(kernels):
    return backends.operators(kernels)


def placed(arguments):
    """Their values, tensors where new ones go."""
    device = torch.get_default_device()
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments.values()]


def refused(operator, arguments):
    with pytest.raises((ValueError, RuntimeError)) as raised:
        operator(*placed(arguments))
    assert str(raised.value)


@pytest.mark.parametrize("name", BAD_PADDED)
def test_padded_losses_check_their_arguments(kernels, name):
    ops = namespace(kernels)
    ops.survival_nll(*placed(PADDED))
    competing = PADDED | {"hazards": torch.rand(3, 4, 2)}
    ops.competing_risks_nll(*placed(competing))
    for bad in BAD_PADDED[name]:
        refused(ops.survival_nll, PADDED | {name: bad})
        if name != "hazards":
            refused(ops.competing_risks_nll, competing | {name: bad})
    for bad in (torch.rand(3, 4), torch.rand(2, 4, 2), torch.rand(3, 5, 2), torch.rand(3, 4, 2, 1)):
        refused(ops.competing_risks_nll, competing | {"hazards": bad})
    refused(ops.survival_nll, PADDED | {"link": 2})
    refused(ops.competing_risks_nll, competing | {"hazards": torch.rand(3, 4, 0)})
    refused(ops.competing_risks_nll, competing | {"hazards": torch.rand(3, 4, 1), "link": 2})


def packed_arguments(hazards=None):
    batch = from_lists([[[1]] * n for n in (3, 1, 2)])
    return {
        "hazards": torch.rand(6) if hazards is None else hazards,
        "row_starts": batch.row_starts,
        "unsorted_indices": batch.unsorted_indices,
        "last_rows": batch.last_rows,
        "event_times": PATIENTS,
        "event_types": TYPES,
        **{name: PADDED[name] for name in list(PADDED)[4:]},
    }


ROWS = {
    "row_starts": [LONG[:0], LONG[0], torch.tensor([0.0, 3, 5, 6]), torch.zeros(4, 1).long()],
    "unsorted_indices": [LONG[0], torch.zeros(3), torch.zeros(3, 1).long(), LONG[:2], LONG],
    "last_rows": [LONG[0], torch.zeros(3), LONG[:2], LONG],
}
TAMPERED = {
    "row_starts": [
        [0] * 9, [0, 3, 5, 7],
        [0, 3, 5, 99], [1, 3, 5, 6], [0, 5, 3, 6], [0, 2, 5, 6], [0, 3, 3, 6],
        [0, 3, -5, 6], [0, 2**62, 5, 6], [-3, 3, 5, 6], [0, 6], [0, 3, 5, 6, 6],
    ],
    "unsorted_indices": [[0, 0, 0], [0, 2, 9], [0, -1, 1], [2, 0, 1], [2**62, 2, 1]],
    "last_rows": [[5, 2, 99], [5, 2, -1], [5, 2, 3], [2**62, 2, 4]],
}  # fmt: skip


@pytest.mark.parametrize("name", [*OF_PATIENTS, *ROWS])
def test_packed_losses_check_their_arguments(kernels, name):
    operator = namespace(kernels).packed_survival_nll
    operator(*placed(packed_arguments()))
    operator(*placed(packed_arguments(torch.rand(6, 2))))
    for bad in (OF_PATIENTS | ROWS)[name]:
        refused(operator, packed_arguments() | {name: bad})
    refused(operator, packed_arguments() | {"link": 2})
    for hazards in (torch.rand(6, 2, 2), torch.rand(()), torch.rand(6, 0), torch.ones(6).long()):
        refused(operator, packed_arguments(hazards))


NOT_OF_THE_BATCH = r": (row_starts|unsorted_indices|last_rows): expected .*, got .*\d$"


@pytest.mark.parametrize("name", TAMPERED)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_rows_that_are_none_of_the_batch_are_refused(compiled, name, needs_grad):
    operators = torch.ops.ehrseq_fast
    for bad in TAMPERED[name]:
        arguments = packed_arguments() | {name: torch.tensor(bad), "needs_grad": needs_grad}
        with pytest.raises(ValueError, match=NOT_OF_THE_BATCH):
            operators.packed_survival_nll(*arguments.values())
        rows = [arguments[key] for key in ("row_starts", "unsorted_indices", "last_rows")]
        with pytest.raises(ValueError, match=NOT_OF_THE_BATCH):
            operators.survival_nll_scale(torch.rand(6), torch.rand(3), *rows, torch.float32)


def test_scaling_checks_its_arguments(kernels):
    operator = namespace(kernels).survival_nll_scale
    batch = from_lists([[[1]] * n for n in (3, 1, 2)])
    rows = [batch.row_starts, batch.unsorted_indices, batch.last_rows]
    good = [torch.rand(3, 4), torch.rand(3), None, None, None, torch.float32]
    torch.testing.assert_close(operator(*good), good[0] * good[1][:, None])
    packed = [torch.rand(6), torch.rand(3), *rows, torch.float32]
    torch.testing.assert_close(operator(*packed), packed[0] * packed[1][batch.patient_of_row])
    for place, bad in (
        (0, torch.rand(())), (0, torch.rand(3, 4).long()), (0, torch.rand(2, 4)),
        (0, torch.rand(3, 4).double()), (1, torch.rand(2)), (1, torch.rand(4)),
        (1, torch.rand(3, 1)), (1, torch.rand(3).double()), (1, torch.rand(3).half()),
        (2, batch.row_starts), (3, batch.unsorted_indices), (5, torch.float64), (5, torch.int64),
        (5, torch.bfloat16),
    ):  # fmt: skip
        arguments = list(good)
        arguments[place] = bad
        refused(operator, dict(enumerate(arguments)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"link": 7}, r"survival_nll: link: expected 0, 1 or 3, got 7"),
        ({"reduction": 5}, r"survival_nll: reduction: expected 0\.\.2, got 5"),
        ({"eps": 0.75}, r"survival_nll: eps: expected \[0, 0\.5\), got 0\.75"),
        ({"hazards": torch.ones(3)}, r"nll: hazards: expected shape \[B, V\], got \[3\]"),
        ({"event_times": LONG}, r"nll: event_times: expected shape \[B\] = \[3\], got \[9\]"),
        ({"sequence_mask": torch.ones(3, 5)}, r"mask: expected shape \[B, V\] .*, got \[3, 5\]"),
    ],
)
def test_errors_say_what_was_expected_and_got(kernels, changed, message):
    """Of compiled kernels and Triton's alike."""
    arguments = {**PADDED, **changed}
    device = torch.get_default_device()
    moved = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments.values()]
    with pytest.raises(ValueError, match=message):
        namespace(kernels).survival_nll(*moved)


def test_errors_of_scaling_say_what_was_expected_and_got(kernels):
    scale = namespace(kernels).survival_nll_scale
    grad, rows = torch.rand(3, 4), (None, None, None)
    with pytest.raises(ValueError, match=r"grad_nll: expected .*\[B\] = \[3\], got \[2\]"):
        scale(grad, torch.rand(2), *rows, torch.float32)
    with pytest.raises(ValueError, match=r"grad_nll: expected .*float32, got .*float64"):
        scale(grad, torch.rand(3).double(), *rows, torch.float32)
    with pytest.raises(ValueError, match=r"row_starts, .*: expected all or none of them, got some"):
        scale(grad, torch.rand(3), torch.arange(5), None, None, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_opcheck_of_scaling(compiled, dtype):
    saved = torch.rand(3, 4).to(torch.float32 if dtype == torch.float16 else dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for grad_nll in (torch.rand((), dtype=wide), torch.rand(3, dtype=wide)):
        arguments = (saved, grad_nll, None, None, None, dtype)
        torch.library.opcheck(torch.ops.ehrseq_fast.survival_nll_scale.default, arguments)
