"""The operator of the survival losses with a weight for each visit in Triton: one launch of the
kernel of those without."""

from __future__ import annotations

from torch import Tensor

from ...checks import accumulator
from ...operations import implemented_in_triton
from ...survival_nll.triton import arguments
from ...survival_nll.triton.launch_nll import nll_and_grad

_NAME = "visit_weighted_nll"


@implemented_in_triton(_NAME)
def visit_weighted_nll(
    hazards: Tensor,
    event_times: Tensor,
    event_types: Tensor,
    sequence_mask: Tensor | None,
    row_starts: Tensor | None,
    unsorted_indices: Tensor | None,
    last_rows: Tensor | None,
    entry_times: Tensor | None,
    sample_weight: Tensor | None,
    visit_weight: Tensor,
    competing: bool,
    link: int,
    censored_included: bool,
    eps: float,
    reduction: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    given = (row_starts, unsorted_indices, last_rows)
    patients, slots, classes = arguments.check_layout(
        _NAME, hazards, competing, sequence_mask, given, "hazards"
    )
    packed = row_starts is not None
    of_visits = tuple(hazards.shape[: 1 if packed else 2])
    dtypes = frozenset({accumulator(hazards.dtype)})
    dims = "[n_visits]" if packed else "[B, V]"
    arguments.check_numbers(_NAME, hazards, "visit_weight", visit_weight, of_visits, dims, dtypes)
    hazards = hazards.contiguous()
    rows = tuple(None if tensor is None else tensor.contiguous() for tensor in given)
    strides = hazards.stride()
    strides = (0, *strides) if packed else strides
    return nll_and_grad(
        _NAME,
        hazards,
        strides if competing else (*strides, 0),
        (rows[0], rows[1], rows[2]),
        (patients, slots, hazards.shape[0] if packed else patients * slots, classes),
        competing,
        event_times,
        event_types,
        sequence_mask,
        entry_times,
        sample_weight,
        link,
        censored_included,
        eps,
        reduction,
        needs_grad,
        visit_weight.contiguous(),
    )
