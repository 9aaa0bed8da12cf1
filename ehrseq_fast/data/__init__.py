"""Patient records: read them, describe and split them, cut them into batches."""

from .dataset import PatientDataset
from .describe import Description, describe
from .meds import read_meds, to_meds
from .omop import read_omop
from .packed import packed_batch
from .padded import PaddedBatch, padded_batch
from .records import EventRecords, Vocabulary, select
from .split import split_by_person
from .store import EventStore, PartWriter, SubjectChunk, write_store

__all__ = [
    "Description",
    "EventRecords",
    "EventStore",
    "PaddedBatch",
    "PartWriter",
    "PatientDataset",
    "SubjectChunk",
    "Vocabulary",
    "describe",
    "packed_batch",
    "padded_batch",
    "read_meds",
    "read_omop",
    "select",
    "split_by_person",
    "to_meds",
    "write_store",
]
