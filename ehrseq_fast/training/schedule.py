"""The learning rate of each step, and the random numbers of each step: functions of its place.

A resumed run needs no state of either but the number of steps taken and the place in the epoch.
"""

from __future__ import annotations

import hashlib
import math

from .config import ScheduleConfig


def rate_factor(schedule: ScheduleConfig, step: int, progress: float) -> float:
    """What the learning rate is multiplied by.

    ``min(1, (step + 1) / warmup_steps)``, times ``f + (1 − f)(1 + cos(π · progress)) / 2`` for
    ``"cosine"`` with the final fraction f.

    Args:
        schedule: which.
        step: steps taken before this one.
        progress: share of all epochs that lies before this step, in [0, 1].

    Example:
        >>> from ehrseq_fast.training.config import ScheduleConfig
        >>> cosine = ScheduleConfig("cosine", warmup_steps=10)
        >>> rate_factor(cosine, 0, 0.0), rate_factor(cosine, 500, 0.5)
        (0.1, 0.5)
    """
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    if schedule.name == "constant":
        return warmup
    rest = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return warmup * (schedule.final_fraction + (1 - schedule.final_fraction) * rest)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of one step's random numbers (dropout) on one rank.

    Example:
        >>> step_seed(0, 1, 0) == step_seed(0, 1, 0) != step_seed(0, 0, 1)
        True
    """
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
