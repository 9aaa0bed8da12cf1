"""Names of MEDS: files, columns, and the codes that have a meaning of their own."""

from __future__ import annotations

DATA, METADATA = "data", "metadata"
CODES = f"{METADATA}/codes.parquet"
SPLITS = f"{METADATA}/subject_splits.parquet"
DATASET = f"{METADATA}/dataset.json"
SETTINGS = "ehrseq_fast"  # the entry of dataset.json that says how a store was exported

SUBJECT, TIME, CODE, VALUE = "subject_id", "time", "code", "numeric_value"
VISIT, VISIT_END = "visit_id", "visit_end"  # extension columns of an export

BIRTH, DEATH = "MEDS_BIRTH", "MEDS_DEATH"
PERIOD_START, PERIOD_END = "OBSERVATION_PERIOD_START", "OBSERVATION_PERIOD_END"
NO_EVENTS = "EHRSEQ_FAST_NO_EVENTS"  # the only event of a subject of whom nothing is known

RESERVED = {
    BIRTH: "The subject's birth",
    DEATH: "The subject's death",
    PERIOD_START: "The start of an observation period",
    PERIOD_END: "The first instant after an observation period",
    NO_EVENTS: "The only event of a subject without any other",
}


def reserved(code: str) -> str | None:
    """Which of the codes with a meaning of their own this is, whatever follows its ``//``."""
    head = code.split("//", 1)[0]
    if head in (BIRTH, DEATH):
        return head
    return code if code in RESERVED else None
