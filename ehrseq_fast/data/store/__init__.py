"""The store of records: a folder of memory-mapped arrays, written in parts, atomically."""

from .chunk import SubjectChunk
from .event_store import EventStore
from .jobs import by_processes
from .merge import new_store, write_store
from .parts import PartWriter
from .splits import SplitRule, by_hash, by_subject
from .visits import NO_VISIT, group_visits

__all__ = [
    "NO_VISIT",
    "EventStore",
    "PartWriter",
    "SplitRule",
    "SubjectChunk",
    "by_hash",
    "by_processes",
    "by_subject",
    "group_visits",
    "new_store",
    "write_store",
]
