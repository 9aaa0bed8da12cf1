"""EHR sequence models that cost what their real codes cost."""

from .backend import use_backend
from .visit_pool import masked_pool, visit_mean_pool

__all__ = ["masked_pool", "use_backend", "visit_mean_pool"]
