"""From hazards to what is asked of them: survival, cumulative hazards and incidences, restricted
mean, median, risk within a horizon; as tensors and as a data frame.

Hazards are ``[B, V]`` padded, or :class:`~ehrseq_fast.PackedRows` ``[n_visits]``: ``h_t`` is the
probability of the event at time t of those who are without it so far. After a patient's last visit
nothing is known: survival stays where it is. Sums of logarithms (``log1p``) keep the digits of
small hazards; a hazard of 1 ends it, and nothing is clamped.

Everything is differentiable where it is smooth, and computed in float32 for 16 bits. ``times`` are
the times of the visits' indices 0, 1, ...: by default these themselves; the ends of intervals where
hazards are of intervals. Before the first time everybody is without the event.
Times in float64 stay it, and so do results that are times (median, restricted mean, a frame's
index), whatever the dtype of the hazards.
"""

from .causes import cumulative_incidence, hazards_from_incidence, hazards_from_pmf
from .curves import cumulative_hazard, median_time, restricted_mean, risk_within, survival
from .frames import incidence_frame, survival_frame

__all__ = [
    "cumulative_hazard",
    "cumulative_incidence",
    "hazards_from_incidence",
    "hazards_from_pmf",
    "incidence_frame",
    "median_time",
    "restricted_mean",
    "risk_within",
    "survival",
    "survival_frame",
]
