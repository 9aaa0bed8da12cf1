"""DeepHit's ranking loss in Triton: ``kernels.py`` holds the kernels, of functions in ``tiles.py``,
and ``launch.py`` the operator that launches them. Importing this registers the operator."""

from . import launch  # noqa: F401
