"""The survival losses with a weight for each visit; their public functions are those without
(:mod:`ehrseq_fast.survival_nll`), called with ``visit_weight``."""
