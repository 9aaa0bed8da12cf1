"""Patient records: read them, describe and split them, cut them into batches."""

from .dataset import PatientDataset
from .describe import Description, describe
from .loading import loader
from .meds import read_meds, to_meds
from .omop import read_omop
from .packed import packed_batch
from .padded import PaddedBatch, padded_batch
from .records import EventRecords, Vocabulary, select
from .sampler import TokenBudgetSampler
from .split import split_by_person
from .store import EventStore, PartWriter, SubjectChunk, write_store
from .tasks import Attrition, FirstEvent, Labels, Outcomes, labels, write_labels

__all__ = [
    "Attrition",
    "Description",
    "EventRecords",
    "EventStore",
    "FirstEvent",
    "Labels",
    "Outcomes",
    "PaddedBatch",
    "PartWriter",
    "PatientDataset",
    "SubjectChunk",
    "TokenBudgetSampler",
    "Vocabulary",
    "describe",
    "labels",
    "loader",
    "packed_batch",
    "padded_batch",
    "read_meds",
    "read_omop",
    "select",
    "split_by_person",
    "to_meds",
    "write_labels",
    "write_store",
]
