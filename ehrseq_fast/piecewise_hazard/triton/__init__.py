"""The loss of rates that are constant within intervals in Triton: ``kernel.py`` holds the kernel
and ``launch.py`` the operator that launches it. Importing this registers the operator."""

from . import launch  # noqa: F401
