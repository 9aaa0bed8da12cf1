"""Medical codes to visit vectors: gather, mask and mean in one pass, and its gradient."""

from .op import masked_pool, visit_mean_pool
from .packed import PackedCodes, codes_in_use, packed_visit_pool

__all__ = ["PackedCodes", "codes_in_use", "masked_pool", "packed_visit_pool", "visit_mean_pool"]
