"""The survival losses with a weight for each visit in Triton: ``launch.py`` has the operator, which
launches the kernel of those without. Importing this registers the operator."""

from . import launch  # noqa: F401
