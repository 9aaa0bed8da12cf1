"""The losses of a horizon in Triton: ``kernel.py`` holds the kernel and ``launch.py`` the operators
that launch it. Importing this registers the operators."""

from . import launch  # noqa: F401
