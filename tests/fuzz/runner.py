"""One fuzz case run and judged; what the child process of ``python -m tests.fuzz`` does."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import cuda_on_cpu
from ..tolerances import tolerance
from . import (
    batches,
    operators,
    survival,  # noqa: F401  (which adds to the operators that are known, as the next does)
    visitwise,  # noqa: F401
)
from .arguments import FLOATING, Call, Draw, change

# What bad arguments may raise. Whatever else comes out is a defect.
ERRORS = (ValueError, TypeError, IndexError, RuntimeError, OverflowError, MemoryError)
CUDA = "cuda/"
TARGETS = (*operators.known_operators(), *batches.BUILDERS)
CUDA_TARGETS = tuple(CUDA + name for name in operators.ON_CUDA)


class Defect(AssertionError):
    """A wrong result, a result from unwritten memory, or an error that is none of a user's."""


def run_case(target: str, seed: int) -> str:
    """Run case ``seed`` of a target; ``"right"``, ``"refused"`` or ``"computed"``.

    Raises:
        Defect: saying what is wrong.
    """
    draw = Draw(zlib.crc32(target.encode()) + (seed << 32))
    torch.manual_seed(seed)
    try:
        if target in batches.BUILDERS:
            call = batches.BUILDERS[target](draw)
        else:
            call = operators.call_of(target.removeprefix(CUDA), draw, _operators_of(target))
            change(draw, call)
    except ERRORS as error:
        raise Defect(f"valid arguments could not be made: {error!r}") from error
    trusts_rows = target == CUDA + "packed_survival_nll"
    return judged(call, is_builder=target in batches.BUILDERS, trusts_rows=trusts_rows)


def _operators_of(target: str) -> Any:
    if not target.startswith(CUDA):
        return torch.ops.ehrseq_fast
    cuda_on_cpu.load()
    return getattr(torch.ops, cuda_on_cpu.NAMESPACE)


def judged(call: Call, is_builder: bool, trusts_rows: bool = False) -> str:
    # of a crash, this is what is left to be read
    print(call.describe(), file=sys.stderr, flush=True)
    try:
        results = call.run(*call.arguments)
    except ERRORS as error:
        return _refused(call, error, is_builder)
    except Exception as error:
        raise Defect(f"{type(error).__name__}: {error}\n{call.describe()}") from error
    results = _tensors(results)
    if call.expected is None or not call.values_kept:
        if not (trusts_rows and _rows_are_changed(call)):
            _refuse_poison(call, results)
        return "computed"
    try:
        expected = _tensors(call.expected())
    except Exception as error:
        raise Defect(f"the reference refuses this: {error!r}\n{call.describe()}") from error
    for at, (result, wanted) in enumerate(zip(results, expected, strict=False)):
        _compare(call, at, result, wanted)
    return "right"


def _rows_are_changed(call: Call) -> bool:
    """Whether ``row_starts`` or ``unsorted_indices`` may not be those of a batch. On a GPU their
    values are held to the memory that they reach, not to reaching every row of the gradient."""
    return any(change.startswith(("argument 1 ", "argument 2 ")) for change in call.changes)


def _refused(call: Call, error: Exception, is_builder: bool) -> str:
    text = str(error)
    if not text or "INTERNAL ASSERT" in text:
        raise Defect(f"an error that does not say what is wrong: {error!r}\n{call.describe()}")
    if not call.changes and not is_builder:
        raise Defect(f"valid arguments are refused: {error!r}\n{call.describe()}")
    if is_builder and call.expected is not None:
        try:
            call.expected()
        except ERRORS as other:
            if (type(other), str(other)) != (type(error), text):
                raise Defect(
                    f"the builders differ: {error!r}, in NumPy {other!r}\n{call.describe()}"
                ) from error
        else:
            raise Defect(f"refused, but not in NumPy: {error!r}\n{call.describe()}")
    return "refused"


def _tensors(results: Any) -> list[Any]:
    return list(results) if isinstance(results, (tuple, list)) else [results]


def _compare(call: Call, at: int, result: Any, wanted: Any) -> None:
    if not isinstance(result, Tensor) or not isinstance(wanted, Tensor) or not result.numel():
        return
    if not result.is_floating_point():
        if not torch.equal(result, wanted):
            raise Defect(f"result {at} is {result}, expected {wanted}\n{call.describe()}")
        return
    # scores and cells that were rounded to 16 bits on the way add their roundings
    bound = tolerance(result.dtype, terms=256)
    try:
        torch.testing.assert_close(
            result.double(),
            wanted.double().reshape(result.shape),
            rtol=8 * bound["rtol"],
            atol=8 * bound["atol"] * max(1.0, float(wanted.abs().max())),
            equal_nan=True,
        )
    except AssertionError as error:
        raise Defect(f"result {at}: {error}\n{call.describe()}") from error


def _refuse_poison(call: Call, results: Sequence[Any]) -> None:
    """Whatever the values, no result may hold memory that nothing was written to (all ones, which
    no arithmetic gives unless it was fed with it)."""
    given = [x for x in call.arguments if isinstance(x, Tensor)]
    if any(map(_holds_poison, given)):
        return
    # a NaN of any kind may be rounded to 16 bits that are all ones
    has_nan = any(x.is_floating_point() and not x.isfinite().all() for x in given)
    for at, result in enumerate(results):
        if not isinstance(result, Tensor) or (has_nan and result.element_size() == 2):
            continue
        if _holds_poison(result):
            raise Defect(f"result {at} holds unwritten memory: {result}\n{call.describe()}")


def _holds_poison(tensor: Tensor) -> bool:
    if tensor.dtype not in FLOATING or tensor.numel() == 0:
        return False
    same_size = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    return bool((tensor.detach().contiguous().view(same_size) == -1).any())
