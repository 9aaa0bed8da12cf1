"""Predictions as pandas data frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arrays import integer
from ..rows import PackedRows
from .causes import cumulative_incidence
from .curves import survival_of
from .reading import expect_rows, padded_hazards, times_of


def survival_frame(
    hazards: Tensor | PackedRows,
    sequence_mask: Tensor | None = None,
    *,
    times: Tensor | None = None,
    interpolate: int = 1,
) -> Any:
    """Survival as a pandas data frame: a row for each time, a column for each patient, as pycox's
    ``predict_surv_df`` gives it.

    Args:
        times: ``[V]``, as in :func:`restricted_mean`; the index.
        interpolate: rows for each interval between times; above 1 survival is linear within.

    Raises:
        ImportError: where pandas is not installed.

    Example:
        >>> import torch
        >>> from ehrseq_fast.predictions import survival_frame
        >>> survival_frame(torch.tensor([[0.5, 0.5], [0.25, 0.0]]), interpolate=2)
                 0     1
        0.0  0.500  0.75
        0.5  0.375  0.75
        1.0  0.250  0.75
    """
    pandas = pandas_for("survival_frame")
    parts = integer("interpolate", interpolate, 1, 10**6)
    padded = padded_hazards(hazards, sequence_mask).detach().cpu()
    curve, grid = refined(survival_of(padded), times_of(padded, times).cpu(), parts)
    return pandas.DataFrame(curve.T.numpy(), index=grid.numpy())


def incidence_frame(
    hazards: Tensor | PackedRows,
    sequence_mask: Tensor | None = None,
    *,
    times: Tensor | None = None,
    interpolate: int = 1,
) -> Any:
    """:func:`cumulative_incidence` as a pandas data frame: a row for each time, a column for each
    cause (1 to K) and patient; ``frame[1]`` is that of cause 1, as :func:`survival_frame` has it.

    Args:
        hazards, sequence_mask: as in :func:`cumulative_incidence`.
        times, interpolate: as in :func:`survival_frame`.

    Raises:
        ValueError, TypeError: as :func:`cumulative_incidence`.
        ImportError: where pandas is not installed.

    Example:
        >>> import torch
        >>> from ehrseq_fast.predictions import incidence_frame
        >>> incidence_frame(torch.tensor([[[0.1, 0.2], [0.5, 0.0]]]))[1]
        patient     0
        0.0      0.10
        1.0      0.45
    """
    pandas = pandas_for("incidence_frame")
    parts = integer("interpolate", interpolate, 1, 10**6)
    if isinstance(hazards, PackedRows):
        expect_rows(hazards, sequence_mask, 2)
        hazards = hazards.to_padded()
    found = cumulative_incidence(hazards, sequence_mask).detach().cpu()
    grid = times_of(found, times).cpu()
    curves, grid = refined(found.movedim(1, 2), grid, parts)  # [B, K, V]
    patients, causes = curves.shape[:2]
    columns = pandas.MultiIndex.from_product(
        [range(1, causes + 1), range(patients)], names=["cause", "patient"]
    )
    rows = curves.permute(2, 1, 0).reshape(len(grid), -1)
    return pandas.DataFrame(rows.numpy(), index=grid.numpy(), columns=columns)


def pandas_for(who: str) -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            f"{who} makes a pandas.DataFrame, and pandas is not installed: "
            "pip install ehrseq_fast[metrics]"
        ) from error
    return pandas


def refined(curve: Tensor, grid: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Curves ``[..., V]`` and their times with what lies between, in so many parts each."""
    if parts == 1:
        return curve, grid
    share = torch.arange(parts, dtype=torch.float64, device="cpu") / parts
    return _between(curve, share.to(curve.dtype)), _between(grid, share.to(grid.dtype))


def _between(values: Tensor, share: Tensor) -> Tensor:
    """Values ``[..., V]`` and what lies between them, linearly."""
    inner = values[..., :-1, None] + values.diff()[..., None] * share
    return torch.cat([inner.flatten(-2), values[..., -1:]], -1)
