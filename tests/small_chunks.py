"""``python -m ehrseq_fast`` with predictions in small row groups, of which a small store has
several."""

from __future__ import annotations

import sys

from ehrseq_fast.cli import main
from ehrseq_fast.training import scoring

VISITS = 300

if __name__ == "__main__":
    scoring.VISITS_PER_CHUNK = VISITS
    sys.exit(main())
