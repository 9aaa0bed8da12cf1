"""Timings and memory on real records: ``python -m benchmarks`` (``--help`` lists the rest)."""

import os

# The memory meter uses torch's profiler, whose tracer reports every start and stop on stderr, in
# the middle of the progress bar. It reads this when torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
