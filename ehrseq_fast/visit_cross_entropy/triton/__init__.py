"""The cross-entropy of one class per visit in Triton: ``kernel.py`` holds the kernel and
``launch.py`` the operator that launches it. Importing this registers the operator."""

from . import launch  # noqa: F401
