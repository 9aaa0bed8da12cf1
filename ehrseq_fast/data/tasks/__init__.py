"""Tasks: outcomes of a store's patients without leakage, with their attrition table."""

from .attrition import Attrition, Rule
from .dates import IndexDates
from .first_event import FirstEvent
from .labels import Labels, labels, write_labels
from .outcomes import Outcomes, SameDayWarning

__all__ = [
    "Attrition",
    "FirstEvent",
    "IndexDates",
    "Labels",
    "Outcomes",
    "Rule",
    "SameDayWarning",
    "labels",
    "write_labels",
]
