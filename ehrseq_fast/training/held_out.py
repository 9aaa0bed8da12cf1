"""Whom a run was trained and tuned on, so that evaluating it on them is told of.

``patients.safetensors`` in the folder of a run has the subject ids of both, sorted: whichever store
is evaluated, and wherever that of training has gone, they can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data import EventStore, Outcomes
from .checkpoint import load_tensors, save_tensors
from .run import Run, RunFolder

_FORMAT = "ehrseq_fast.patients"


def save_patients(folder: RunFolder, store: EventStore, train: Outcomes, tuning: Outcomes) -> None:
    """Write the subject ids of both populations, before a run ends."""
    ids = {
        name: torch.from_numpy(np.unique(store.subject_ids[outcomes.patients]).astype(np.int64))
        for name, outcomes in (("train", train), ("tuning", tuning))
    }
    save_tensors(folder.patients, ids, {"format": _FORMAT})


@dataclass(frozen=True)
class Overlap:
    """How many of the patients who are evaluated a run has seen.

    Attributes:
        evaluated: patients evaluated.
        trained, tuned: of them, those whose subject id is one of the population that was trained on
            and of that by whose loss the epoch was chosen; None where the run does not say whom it
            saw.
        same_store: whether the records are those of training, so that equal ids are equal patients.
    """

    evaluated: int
    trained: int | None
    tuned: int | None
    same_store: bool

    @property
    def held_out(self) -> bool | None:
        """Whether nobody who is evaluated was seen; None where that is not known."""
        return None if self.trained is None else not (self.trained or self.tuned)

    @property
    def note(self) -> str:
        """What must be known of it before the figures are read; empty where nobody was seen."""
        if self.held_out is None:
            return (
                "whether these patients are held out cannot be told: the run has no "
                "patients.safetensors that says whom it was trained and tuned on"
            )
        if self.held_out:
            return ""
        seen = []
        if self.trained:
            seen.append(f"{self.trained:,} were trained on")
        if self.tuned:
            seen.append(f"{self.tuned:,} are of the tuning split, by which the epoch was chosen")
        said = (
            f"not held out: of the {self.evaluated:,} patients evaluated {' and '.join(seen)}; "
            "the figures are too good to be those of new patients"
        )
        if not self.same_store:
            said += (
                " (known by their subject ids: the store is not that of training, and if its ids "
                "are those of other persons this does not hold)"
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        """As ``report.json`` has it."""
        return {"held_out": self.held_out, "trained_on": self.trained, "tuned_on": self.tuned}


def overlap_of(run: Run, store: EventStore, outcomes: Outcomes) -> Overlap:
    """Compare those who are evaluated with those whom a run saw.

    Raises:
        CheckpointError: for a damaged ``patients.safetensors``, naming it.
    """
    evaluated = np.unique(store.subject_ids[outcomes.patients])
    same = store.header["content_sha256"] == run.result["store_sha256"]
    path = run.folder.patients
    if not path.exists():
        return Overlap(len(evaluated), None, None, same)
    seen = load_tensors(path).tensors
    trained, tuned = (_among(evaluated, seen[name].numpy()) for name in ("train", "tuning"))
    return Overlap(len(evaluated), trained, tuned, same)


def _among(some: NDArray[np.int64], ascending: NDArray[np.int64]) -> int:
    """How many of them are in an ascending array."""
    if not len(ascending):
        return 0
    place = np.searchsorted(ascending, some).clip(max=len(ascending) - 1)
    return int(np.count_nonzero(ascending[place] == some))
