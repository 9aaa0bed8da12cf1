"""Cross-entropy of one class per visit."""

from .module import VisitCrossEntropyLoss
from .op import visit_cross_entropy

__all__ = ["VisitCrossEntropyLoss", "visit_cross_entropy"]
