"""The command line: ``ehrseq-fast`` and ``python -m ehrseq_fast``, one module for each command."""

from .info import GPU_RUNS, describe, describe_gpu_runs
from .main import main

__all__ = ["GPU_RUNS", "describe", "describe_gpu_runs", "main"]
